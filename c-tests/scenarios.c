/*
 * What a client may do with a PGcancelConn: one function a scenario. They call libpq through transcript.h where the call
 * is to be compared, and directly where only its end result is.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "session.h"
#include "transcript.h"

#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

/* More than any cancel takes with a wait before each poll: mid-flight scenarios stop at the one that ends it. */
#define MAX_POLLS 30

static void
run_blocking(struct context *context)
{
	PGcancelConn *cancel = create(context->session);

	blocking(cancel);
	finish(cancel);
}

static void
run_polled(struct context *context)
{
	PGcancelConn *cancel = create(context->session);

	if (start(cancel))
		poll_to_end(cancel);
	finish(cancel);
}

/* Never waits: a poll that comes too early must do no harm. What it answers depends on timing, so only the end counts. */
static void
run_polled_too_early(struct context *context)
{
	PGcancelConn *cancel = create(context->session);
	PostgresPollingStatusType last = PGRES_POLLING_WRITING;

	start(cancel);
	while (last == PGRES_POLLING_READING || last == PGRES_POLLING_WRITING)
		last = PQcancelPoll(cancel);
	say_call("PQcancelPoll (last)", last == PGRES_POLLING_OK ? "OK" : "FAILED", cancel);
	finish(cancel);
}

/* Every cycle must look like the first (say() drops the repeats) and leave no descriptor behind. */
static void
run_cycles(struct context *context)
{
	PGcancelConn *cancel = create(context->session);
	int			before = open_descriptors();

	for (int cycle = 0; cycle < context->number; cycle++)
	{
		int			result = PQcancelBlocking(cancel);
		int			status = PQcancelStatus(cancel);

		PQcancelReset(cancel);
		say("cycle: PQcancelBlocking -> %d status=%d, after PQcancelReset status=%d socket=%d error=\"%s\"", result, status,
			PQcancelStatus(cancel), PQcancelSocket(cancel), PQcancelErrorMessage(cancel));
	}
	say("descriptors: %+d", open_descriptors() - before);
	finish(cancel);
}

/* As run_cycles, but with an object of its own for each cycle. */
static void
run_objects(struct context *context)
{
	int			before = open_descriptors();

	for (int cycle = 0; cycle < context->number; cycle++)
	{
		PGcancelConn *cancel = PQcancelCreate(context->session);
		int			result = PQcancelBlocking(cancel);

		say("object: PQcancelBlocking -> %d status=%d error=\"%s\"", result, PQcancelStatus(cancel),
			PQcancelErrorMessage(cancel));
		PQcancelFinish(cancel);
	}
	say("descriptors: %+d", open_descriptors() - before);
}

/* Waits before each of up to `polls` polls. True when the cancel came to its end. How many polls a handshake takes depends
 * on timing and on the TLS library, so these are not reported. */
static bool
poll_times(PGcancelConn *cancel, int polls)
{
	PostgresPollingStatusType wanted = PGRES_POLLING_WRITING;

	if (PQcancelStart(cancel) != 1)
		die("PQcancelStart: %s", PQcancelErrorMessage(cancel));
	for (int i = 0; i < polls; i++)
	{
		if (!wait_until_ready(PQcancelSocket(cancel), wanted))
			die("stuck");
		wanted = PQcancelPoll(cancel);
		if (wanted == PGRES_POLLING_OK)
			return true;
		if (wanted == PGRES_POLLING_FAILED)
			die("PQcancelPoll: %s", PQcancelErrorMessage(cancel));
	}
	return false;
}

/* Reset in mid-flight after each number of polls: then the object must be as new, in both ways to use it. */
static void
run_mixed_resets(struct context *context)
{
	PGcancelConn *cancel = create(context->session);
	int			before = open_descriptors();
	bool		ended = false;

	for (int polls = 0; polls < MAX_POLLS && !ended; polls++)
	{
		int			blocked;
		bool		polled;

		ended = poll_times(cancel, polls);
		PQcancelReset(cancel);
		blocked = PQcancelBlocking(cancel);
		PQcancelReset(cancel);
		polled = poll_times(cancel, MAX_POLLS);
		PQcancelReset(cancel);
		say("after PQcancelReset in mid-flight: PQcancelBlocking -> %d, polled -> %d, status=%d socket=%d error=\"%s\"",
			blocked, polled, PQcancelStatus(cancel), PQcancelSocket(cancel), PQcancelErrorMessage(cancel));
	}
	say("ended=%d descriptors: %+d", ended, open_descriptors() - before);
	finish(cancel);
}

/* PQcancelFinish in mid-flight after each number of polls. */
static void
run_finish_in_flight(struct context *context)
{
	int			before = open_descriptors();
	bool		ended = false;

	for (int polls = 0; polls < MAX_POLLS && !ended; polls++)
	{
		PGcancelConn *cancel = PQcancelCreate(context->session);

		ended = poll_times(cancel, polls);
		PQcancelFinish(cancel);
	}
	say("ended=%d descriptors: %+d", ended, open_descriptors() - before);
}

static void
run_start_twice(struct context *context)
{
	PGcancelConn *cancel = create(context->session);

	start(cancel);
	start(cancel);
	start(cancel);
	poll_once(cancel);
	reset(cancel);
	blocking(cancel);
	finish(cancel);
}

/* A second request on the same object without PQcancelReset: after success, and whatever else the first came to. */
static void
run_start_again(struct context *context)
{
	PGcancelConn *cancel = create(context->session);

	blocking(cancel);
	start(cancel);
	blocking(cancel);
	reset(cancel);
	blocking(cancel);
	finish(cancel);
}

static void
run_poll_before_start(struct context *context)
{
	PGcancelConn *cancel = create(context->session);

	poll_once(cancel);
	poll_once(cancel);
	start(cancel);
	reset(cancel);
	blocking(cancel);
	finish(cancel);
}

/* Polls after the end, good or bad. */
static void
run_poll_after_end(struct context *context)
{
	PGcancelConn *cancel = create(context->session);

	blocking(cancel);
	poll_once(cancel);
	say("again");
	poll_once(cancel);
	finish(cancel);
}

/* An object that was BAD from the beginning: PQcancelReset does not make it better. */
static void
run_reset_bad(struct context *context)
{
	PGcancelConn *cancel = create(NULL);

	(void) context;
	start(cancel);
	poll_once(cancel);
	reset(cancel);
	start(cancel);
	poll_once(cancel);
	reset(cancel);
	blocking(cancel);
	finish(cancel);
}

static void
run_null(struct context *context)
{
	(void) context;
	say_call("NULL", "shown", NULL);
	start(NULL);
	blocking(NULL);
	finish(NULL);
}

/* libpq 18 crashes here; pqcancel must not. */
static void
run_null_poll_and_reset(struct context *context)
{
	(void) context;
	poll_once(NULL);
	reset(NULL);
	say("survived");
}

/* Tells a PQcancelCreate of a session that is not usable. */
static void
try_unusable(PGconn *session, const char *what)
{
	PGcancelConn *cancel;

	say("session: %s, status %s", what, PQstatus(session) == CONNECTION_OK ? "OK" : "not OK");
	cancel = create(session);
	start(cancel);
	poll_once(cancel);
	reset(cancel);
	blocking(cancel);
	finish(cancel);
}

/* The backend is gone, and the session has noticed. */
static void
run_closed_session(struct context *context)
{
	PGconn	   *monitor = connect_monitor();
	PGcancelConn *early = create(context->session);
	int			pid = PQbackendPID(context->session);

	wait_for_row(monitor, "select where pg_terminate_backend(%d)", pid);
	wait_for_row(monitor, "select where not exists (select from pg_stat_activity where pid = %d)", pid);
	PQclear(PQexec(context->session, "select 1"));
	try_unusable(context->session, "terminated");
	/* What was created before does not need the session any more. */
	blocking(early);
	finish(early);
	PQfinish(monitor);
}

static void
run_bad_session(struct context *context)
{
	char		conninfo[4096];
	PGconn	   *bad;

	snprintf(conninfo, sizeof(conninfo), "%s dbname='no such database'", context->conninfo);
	bad = connect_session(conninfo);
	try_unusable(bad, "failed");
	PQfinish(bad);
	bad = PQconnectdb("sslmode=nonsense");
	try_unusable(bad, "bad options");
	PQfinish(bad);
}

/* A session on its way has no cancel key yet. */
static void
run_half_open_session(struct context *context)
{
	PGconn	   *half = PQconnectStart(context->conninfo);

	try_unusable(half, "started");
	PQfinish(half);
}

static void
run_two_objects(struct context *context)
{
	PGcancelConn *one = create(context->session);
	PGcancelConn *two = create(context->session);

	start(one);
	start(two);
	poll_to_end(one);
	poll_to_end(two);
	reset(one);
	blocking(one);
	finish(two);
	finish(one);
}

static void
run_session_finished(struct context *context)
{
	PGcancelConn *cancel = create(context->session);

	PQfinish(context->session);
	context->session = NULL;
	blocking(cancel);
	reset(cancel);
	if (start(cancel))
		poll_to_end(cancel);
	finish(cancel);
}

/* More than FD_SETSIZE descriptors: a library that waits with select(2) writes past its fd_set. */
static void
run_many_descriptors(struct context *context)
{
	struct rlimit limit;
	int			highest = 0;

	if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
		die("getrlimit: %m");
	limit.rlim_cur = limit.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
		die("setrlimit: %m");
	while (highest <= 1100)
		if ((highest = dup(STDIN_FILENO)) < 0)
			die("dup: %m");
	run_blocking(context);
	run_polled(context);
}

/*
 * The time that both libraries have, by which they also wait: these functions are found before the C library's. Once it is ours
 * it passes only where a library waits for a server that will do nothing any more, and then at once: so it does not matter how
 * fast the machine is.
 */
static bool time_is_ours;
static time_t now;				/* milliseconds */

int
clock_gettime(clockid_t clock, struct timespec *time)
{
	if (!time_is_ours)
		return (int) syscall(SYS_clock_gettime, clock, time);
	*time = (struct timespec) {.tv_sec = now / 1000,.tv_nsec = now % 1000 * 1000000};
	return 0;
}

int
gettimeofday(struct timeval *time, void *zone)
{
	struct timespec precise;

	(void) zone;
	clock_gettime(CLOCK_REALTIME, &precise);
	*time = (struct timeval) {.tv_sec = precise.tv_sec,.tv_usec = precise.tv_nsec / 1000};
	return 0;
}

/* Under a name of its own: of poll() the compiler knows from its header that it never reads what it is given. */
int			wait_for_server(struct pollfd *fds, nfds_t count, int timeout) __asm__("poll");

int
wait_for_server(struct pollfd *fds, nfds_t count, int timeout)
{
	struct timespec limit = {.tv_sec = timeout / 1000,.tv_nsec = timeout % 1000 * 1000000};

	if (!time_is_ours || count != 1)
		return ppoll(fds, count, timeout < 0 ? NULL : &limit, NULL);
	if (!wait_until_ready(fds->fd, fds->events & POLLIN ? PGRES_POLLING_READING : PGRES_POLLING_WRITING))
	{
		if (timeout >= 0)
		{
			now += timeout;
			return 0;
		}
		say("waits for ever");
		gate("for-ever");
	}
	return ppoll(fds, count, NULL, NULL);
}

static void
run_timed(struct context *context)
{
	PGcancelConn *cancel = create(context->session);
	time_t		began = now = time(NULL) * 1000;

	time_is_ours = true;
	blocking(cancel);
	time_is_ours = false;
	say("waited: %ld ms", now - began);
	finish(cancel);
}

/* The whole point: a query that truly runs is cancelled, and the session works on. NUMBER 1: polled. */
static void
run_query(struct context *context)
{
	PGconn	   *monitor = connect_monitor();
	PGresult   *result;

	if (!PQsendQuery(context->session, "select pg_sleep(1000)"))
		die("PQsendQuery: %s", PQerrorMessage(context->session));
	wait_for_row(monitor, "select from pg_stat_activity where pid = %d and wait_event = 'PgSleep'",
				 PQbackendPID(context->session));
	if (context->number)
		run_polled(context);
	else
		run_blocking(context);
	while ((result = PQgetResult(context->session)) != NULL)
	{
		say("result: SQLSTATE %s", PQresultErrorField(result, PG_DIAG_SQLSTATE));
		PQclear(result);
	}
	result = PQexec(context->session, "select 42");
	say("next query: %s", PQntuples(result) == 1 ? PQgetvalue(result, 0, 0) : PQresultErrorMessage(result));
	PQclear(result);
	PQfinish(monitor);
}

const struct scenario scenarios[] = {
	{"blocking", run_blocking},
	{"polled", run_polled},
	{"polled-too-early", run_polled_too_early},
	{"cycles", run_cycles},
	{"objects", run_objects},
	{"mixed-resets", run_mixed_resets},
	{"finish-in-flight", run_finish_in_flight},
	{"start-twice", run_start_twice},
	{"start-again", run_start_again},
	{"poll-before-start", run_poll_before_start},
	{"poll-after-end", run_poll_after_end},
	{"reset-bad", run_reset_bad},
	{"null", run_null},
	{"null-poll-and-reset", run_null_poll_and_reset},
	{"closed-session", run_closed_session},
	{"bad-session", run_bad_session},
	{"half-open-session", run_half_open_session},
	{"two-objects", run_two_objects},
	{"session-finished", run_session_finished},
	{"many-descriptors", run_many_descriptors},
	{"timed", run_timed},
	{"query", run_query},
	{NULL, NULL},
};
