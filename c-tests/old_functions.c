/*
 * What a client may do with PQgetCancel, PQcancel, PQfreeCancel and PQrequestCancel: one function a scenario.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "session.h"
#include "transcript.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RECOMMENDED_SIZE 256
#define ODD_ERRNO 4711			/* no call sets this one */

/* Prints text so that everything in it can be seen. */
static void
say_text(const char *what, int result, const char *text, size_t size)
{
	char		shown[4 * RECOMMENDED_SIZE + 1];
	char	   *to = shown;

	for (size_t i = 0; i < size; i++)
		to += sprintf(to, text[i] == '\n' ? "\\n" : text[i] == 0 ? "\\0" : "%c", text[i]);
	*to = 0;
	say("%s -> %d errno %s, errbuf \"%s\"", what, result, errno == ODD_ERRNO ? "kept" : "changed", shown);
}

/* PQcancel with a buffer of this size, and what became of it: up to the zero byte, or that it was left alone. */
static int
cancel_sized(PGcancel *cancel, int size)
{
	char		errbuf[RECOMMENDED_SIZE + 1];
	int			result;

	memset(errbuf, '#', sizeof(errbuf));
	if (size == 0)
		errbuf[0] = 0;			/* libpq measures it all the same */
	errno = ODD_ERRNO;
	result = PQcancel(cancel, errbuf, size);
	say_text("PQcancel", result, errbuf, errbuf[0] == '#' ? 4 : strnlen(errbuf, RECOMMENDED_SIZE));
	for (int i = size > 0 ? size : 1; i <= RECOMMENDED_SIZE; i++)
		if (errbuf[i] != '#')
			die("wrote at %d into a buffer of %d bytes", i, size);
	return result;
}

static PGcancel *
get(PGconn *session)
{
	PGcancel   *cancel = PQgetCancel(session);

	say("PQgetCancel -> %s", cancel ? "a PGcancel" : "NULL");
	return cancel;
}

static void
run_cancel(struct context *context)
{
	PGcancel   *cancel = get(context->session);

	cancel_sized(cancel, RECOMMENDED_SIZE);
	PQfreeCancel(cancel);
}

/* One PGcancel may be used often, and longer than its session lives. */
static void
run_often(struct context *context)
{
	int			before = open_descriptors();
	PGcancel   *cancel = get(context->session);

	for (int i = 0; i < context->number; i++)
		cancel_sized(cancel, RECOMMENDED_SIZE);
	PQfinish(context->session);
	context->session = NULL;
	cancel_sized(cancel, RECOMMENDED_SIZE);
	/* The session's own descriptor is closed now. */
	say("descriptors: %+d", open_descriptors() - before + 1);
	PQfreeCancel(cancel);
}

/* Every size of a buffer, for a message with an error number. */
static void
run_sizes(struct context *context)
{
	PGcancel   *cancel = get(context->session);

	for (int size = 0; size < 64; size++)
		cancel_sized(cancel, size);
	cancel_sized(cancel, RECOMMENDED_SIZE);
	PQfreeCancel(cancel);
}

static void
run_null(struct context *context)
{
	(void) context;
	say("PQgetCancel(NULL) -> %s", PQgetCancel(NULL) ? "a PGcancel" : "NULL");
	for (int size = 0; size < 48; size++)
		cancel_sized(NULL, size);
	PQfreeCancel(NULL);
	say("PQrequestCancel(NULL) -> %d", PQrequestCancel(NULL));
}

/* No key has come yet. */
static void
run_half_open(struct context *context)
{
	PGconn	   *half = PQconnectStart(context->conninfo);
	PGcancel   *cancel = get(half);

	for (int size = 0; size < 52; size++)
		cancel_sized(cancel, size);
	PQfreeCancel(cancel);
	say("PQrequestCancel -> %d, \"%s\"", PQrequestCancel(half), PQerrorMessage(half));
	PQfinish(half);
}

/* The server has ended the session, and libpq knows it. */
static void
run_closed(struct context *context)
{
	PGconn	   *monitor = connect_monitor();
	char		query[128];

	snprintf(query, sizeof(query), "select pg_terminate_backend(%d)", PQbackendPID(context->session));
	PQclear(PQexec(monitor, query));
	wait_for_row(monitor, "select where not exists (select from pg_stat_activity where pid = %d)",
				 PQbackendPID(context->session));
	PQclear(PQexec(context->session, "select 1"));
	get(context->session);
	say("PQrequestCancel -> %d, \"%s\"", PQrequestCancel(context->session), PQerrorMessage(context->session));
	PQfinish(monitor);
}

static void
run_request(struct context *context)
{
	int			result;

	errno = ODD_ERRNO;
	result = PQrequestCancel(context->session);
	say_text("PQrequestCancel", result, PQerrorMessage(context->session), strlen(PQerrorMessage(context->session)));
	/* The message is the connection's, which goes on. */
	PQclear(PQexec(context->session, "select 1/0"));
	say("next query: %s", PQerrorMessage(context->session));
	PQclear(PQexec(context->session, "select 1"));
	say("the query after it: \"%s\"", PQerrorMessage(context->session));
}

/* What PQgetCancel has started. */
static void
run_threads(struct context *context)
{
	PGcancel   *cancel = get(context->session);
	struct dirent **names;

	say("threads: %d", scandir("/proc/self/task", &names, NULL, NULL) - 2);
	PQfreeCancel(cancel);
}

/* A running query, cancelled; the session works on. */
static void
run_query(struct context *context)
{
	PGconn	   *monitor = connect_monitor();
	PGcancel   *cancel = get(context->session);
	PGresult   *result;

	if (!PQsendQuery(context->session, "select pg_sleep(60)"))
		die("PQsendQuery: %s", PQerrorMessage(context->session));
	wait_for_row(monitor, "select where exists (select from pg_stat_activity where pid = %d and wait_event = 'PgSleep')",
				 PQbackendPID(context->session));
	if (context->number)
		say("PQrequestCancel -> %d", PQrequestCancel(context->session));
	else
		cancel_sized(cancel, RECOMMENDED_SIZE);
	result = PQgetResult(context->session);
	say("result: SQLSTATE %s", PQresultErrorField(result, PG_DIAG_SQLSTATE));
	PQclear(result);
	while ((result = PQgetResult(context->session)))
		PQclear(result);
	result = PQexec(context->session, "select 42");
	say("next query: %s", PQgetvalue(result, 0, 0));
	PQclear(result);
	PQfreeCancel(cancel);
	PQfinish(monitor);
}

/*
 * Objects that cross between libpq's own functions and those in front of it.
 */
struct functions
{
	PGcancel   *(*get) (PGconn *);
	int			(*cancel) (PGcancel *, char *, int);
	void		(*free) (PGcancel *);
};

static void *
function_of(void *libpq, const char *name)
{
	void	   *function = dlsym(libpq, name);

	if (!function)
		die("%s", dlerror());
	return function;
}

/* libpq's own, past whatever stands in front of it: dlsym() with a handle looks into that object first. */
static struct functions
libpqs_own(void)
{
	void	   *libpq = dlopen("libpq.so.5", RTLD_NOW | RTLD_NOLOAD);
	struct functions own;

	if (!libpq)
		die("%s", dlerror());
	*(void **) &own.get = function_of(libpq, "PQgetCancel");
	*(void **) &own.cancel = function_of(libpq, "PQcancel");
	*(void **) &own.free = function_of(libpq, "PQfreeCancel");
	return own;
}

static void
cross(const char *what, PGconn *session, struct functions made_by, struct functions used_by, struct functions freed_by)
{
	char		errbuf[RECOMMENDED_SIZE] = "";
	PGcancel   *cancel = made_by.get(session);
	int			result = used_by.cancel(cancel, errbuf, sizeof(errbuf));

	say("%s -> %d \"%s\"", what, result, errbuf);
	freed_by.free(cancel);
}

static void
run_crossing(struct context *context)
{
	struct functions own = libpqs_own();
	struct functions ours = {PQgetCancel, PQcancel, PQfreeCancel};

	/* So that the libpq is known, as it is in any program that has called us once. */
	PQfreeCancel(PQgetCancel(context->session));
	cross("libpq's, cancelled and freed by ours", context->session, own, ours, ours);
	cross("ours, freed by libpq", context->session, ours, ours, own);
	cross("ours, cancelled by libpq", context->session, ours, own, ours);
}

/* As ruby-pg and userver read it, which know the struct of libpq 17 and older. */
static void
run_struct(struct context *context)
{
	struct
	{
		char		address[128];
		int			length;
		int			padding;
		int			be_pid;
		int			be_key;
	}		   *theirs,
			   *ours;
	struct functions own = libpqs_own();

	ours = (void *) PQgetCancel(context->session);
	theirs = (void *) own.get(context->session);
	say("be_pid: %s", ours->be_pid == PQbackendPID(context->session) ? "the backend's" : "another");
	say("be_key: %s", ours->be_key == theirs->be_key ? "libpq's" : "another");
	say("address: %s", memcmp(ours->address, theirs->address, 110) == 0 ? "libpq's" : "another");
	say("length: %s", ours->length == theirs->length ? "libpq's" : ours->length == 0 ? "none" : "another");
	own.free((PGcancel *) theirs);
	PQfreeCancel((PGcancel *) ours);
}

const struct scenario scenarios[] = {
	{"cancel", run_cancel},
	{"often", run_often},
	{"sizes", run_sizes},
	{"null", run_null},
	{"half-open", run_half_open},
	{"closed", run_closed},
	{"request", run_request},
	{"threads", run_threads},
	{"query", run_query},
	{"crossing", run_crossing},
	{"struct", run_struct},
	{NULL, NULL},
};
