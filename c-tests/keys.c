/*
 * Sessions with cancel keys of every kind: see key_server.py, which hands them out. Each session is cancelled by every function
 * that cancels.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "session.h"
#include "transcript.h"

#include <stdio.h>

#define ERRBUF_SIZE 256
#define LONGEST_KEY 256

static void
cancel_by_pqcancel(PGcancel *cancel)
{
	char		errbuf[ERRBUF_SIZE] = "";
	int			result = PQcancel(cancel, errbuf, sizeof(errbuf));

	say("PQcancel -> %d \"%s\"", result, errbuf);
}

static void
cancel_by_every_function(PGconn *session)
{
	PGcancelConn *blocked = create(session);
	PGcancelConn *polled = create(session);
	PGcancel   *old = PQgetCancel(session);

	blocking(blocked);
	finish(blocked);
	if (start(polled))
		poll_to_end(polled);
	finish(polled);
	say("PQgetCancel -> %s", old ? "a PGcancel" : "NULL");
	cancel_by_pqcancel(old);
	PQfreeCancel(old);
	say("PQrequestCancel -> %d", PQrequestCancel(session));
}

/* In a session of its own. */
static void
cancel_with_key(const char *conninfo, const char *key)
{
	char		options[2048];
	PGconn	   *session;

	snprintf(options, sizeof(options), "%s dbname='%s'", conninfo, key);
	session = connect_session(options);
	say("key: %s, session: %s%s", key, PQstatus(session) == CONNECTION_OK ? "OK" : "BAD ", PQerrorMessage(session));
	cancel_by_every_function(session);
	PQfinish(session);
}

/* Also those that are too short, and one that is too long. */
static void
run_every_length(struct context *context)
{
	for (int length = 0; length <= LONGEST_KEY + 1; length++)
	{
		char		key[16];

		snprintf(key, sizeof(key), "%d", length);
		cancel_with_key(context->conninfo, key);
	}
}

/* The server sends none at all. */
static void
run_no_key(struct context *context)
{
	cancel_with_key(context->conninfo, "none");
}

/* What others take for a backend that there is not. */
static void
run_pid_zero(struct context *context)
{
	cancel_with_key(context->conninfo, "4 of 0");
}

/* In the middle of the session the server hands out another key. What was made before goes on with the one before. */
static void
run_another_key(struct context *context)
{
	PGcancel   *before = PQgetCancel(context->session);
	PGcancelConn *created_before = create(context->session);
	char		length[16];

	snprintf(length, sizeof(length), "%d", context->number);
	for (int i = 0; i < 2; i++)
	{
		PQclear(PQexec(context->session, length));
		cancel_by_every_function(context->session);
	}
	cancel_by_pqcancel(before);
	PQfreeCancel(before);
	blocking(created_before);
	finish(created_before);
}

const struct scenario scenarios[] = {
	{"every-length", run_every_length},
	{"no-key", run_no_key},
	{"pid-zero", run_pid_zero},
	{"another-key", run_another_key},
	{NULL, NULL},
};
