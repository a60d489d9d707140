/*
 * Cancels of which the trace tells, with what must not be in it.
 *
 * A table of scenarios for driver.c.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "transcript.h"

#include <dirent.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "attempts.h"
#include "query.h"
#include "session.h"

#define MOST_SESSIONS 16
#define ATTEMPTS_EACH 500

/* Where libpq 12 to 17 have the key in struct pg_cancel. */
#define BE_KEY 140

static PGcancel *
get_cancel(PGconn *session)
{
	PGcancel   *cancel = PQgetCancel(session);
	unsigned int key;

	if (!cancel)
		die("PQgetCancel: NULL");
	memcpy(&key, (const char *) cancel + BE_KEY, sizeof(key));
	say("key: %u", key);
	return cancel;
}

static void
say_threads(void)
{
	DIR		   *tasks = opendir("/proc/self/task");
	int			count = 0;

	if (!tasks)
		die("/proc/self/task: %m");
	for (struct dirent *entry = readdir(tasks); entry; entry = readdir(tasks))
		count += entry->d_name[0] != '.';
	closedir(tasks);
	say("threads: %d", count);
}

/* The session's query is cancelled. */
static void
run_query(struct context *context)
{
	PGconn	   *monitor = connect_monitor();
	int			descriptors = open_descriptors();
	PGcancel   *cancel = get_cancel(context->session);

	start_query(context->session, monitor);
	attempt(cancel);
	say("query: %s", end_of_query(context->session));
	say_attempts();
	say_threads();
	say("descriptors: %s", open_descriptors() == descriptors ? "as before" : "others");
	PQfreeCancel(cancel);
	PQfinish(monitor);
}

/* The session does nothing; whether a cancel comes through is up to the test. */
static void
run_idle(struct context *context)
{
	PGcancel   *cancel = get_cancel(context->session);

	attempt(cancel);
	say_attempts();
	PQfreeCancel(cancel);
}

/* As programs that become daemons do. */
static void
run_elsewhere(struct context *context)
{
	PGcancel   *cancel = get_cancel(context->session);

	if (chdir("/") < 0)
		die("chdir: %m");
	attempt(cancel);
	say_attempts();
	PQfreeCancel(cancel);
}

static void *
cancel_often(void *session)
{
	for (int i = 0; i < ATTEMPTS_EACH; i++)
	{
		PGcancel   *cancel = PQgetCancel(session);

		attempt(cancel);
		PQfreeCancel(cancel);
	}
	return NULL;
}

/* NUMBER sessions, each cancelled by a thread of its own, all at once. */
static void
run_threads(struct context *context)
{
	PGconn	   *sessions[MOST_SESSIONS];
	pthread_t	threads[MOST_SESSIONS];

	if (context->number > MOST_SESSIONS)
		die("too many sessions");
	for (int i = 0; i < context->number; i++)
	{
		sessions[i] = i == 0 ? context->session : connect_session(context->conninfo);
		PQfreeCancel(get_cancel(sessions[i]));
	}
	for (int i = 0; i < context->number; i++)
		if (pthread_create(&threads[i], NULL, cancel_often, sessions[i]) != 0)
			die("no thread");
	for (int i = 0; i < context->number; i++)
		pthread_join(threads[i], NULL);
	for (int i = 1; i < context->number; i++)
		PQfinish(sessions[i]);
	say_attempts();
}

/* By the new functions. */
static void
run_blocking(struct context *context)
{
	PGcancelConn *cancel = create(context->session);

	blocking(cancel);
	finish(cancel);
}

const struct scenario scenarios[] = {
	{"query", run_query},
	{"idle", run_idle},
	{"elsewhere", run_elsewhere},
	{"threads", run_threads},
	{"blocking", run_blocking},
	{NULL, NULL}
};
