/*
 * Cancels while memory is short: at the first allocation, at the STEPth next, and so on until none fails any more. Then all
 * over again (unless each is a process of its own): a cancel that knows the session already takes fewer.
 *
 *     starving CONNINFO (fork|here|warm|thread|old)-(ours|all)-(on|once) [STEP]
 *
 * fork: each cancel in a child of its own, in which the library has not been used before; the parent tells how it ended.
 * here: all in one process, where every shortage may leave something behind. warm: the same, after a good cancel.
 * thread: as warm, but each in a new thread, and that in a child of its own: OpenSSL keeps something for each thread.
 * old: as here, but by PQgetCancel and PQcancel; of a session over TLS it is another thread of the library's that starves.
 * Prints one line for each way it ended.
 */
#define _GNU_SOURCE
#include "transcript.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "starve.h"

#define HANGS_AFTER_SECONDS 60
#define WATCHDOG_SECONDS 600
#define MAX_LISTED 12

enum ending
{
	DELIVERED, DELIVERED_STARVED, NULL_OBJECT, BAD_OBJECT, FAILED, NOT_AGAIN, NO_MESSAGE, LEAKED, DIED, HUNG, ENDINGS
};

static const char *const ending_names[ENDINGS] = {
	"delivered", "delivered in spite of it", "NULL", "bad from the start", "failed with a message",
	"failed, and not good again", "failed without a message", "descriptors leaked", "died", "hung"
};

static struct
{
	long		count;
	long		first[MAX_LISTED];
}			tally[ENDINGS];

static bool
has_message(PGcancelConn *cancel)
{
	const char *message = PQcancelErrorMessage(cancel);
	size_t		length = message ? strlen(message) : 0;

	return length > 1 && message[length - 1] == '\n';
}

/* To the end, or until a call fails. No allocation of ours is in here. */
static bool
deliver(PGcancelConn *cancel, bool polled)
{
	PostgresPollingStatusType wanted = PGRES_POLLING_WRITING;

	if (!polled)
		return PQcancelBlocking(cancel) == 1;
	if (PQcancelStart(cancel) != 1)
		return false;
	while (wanted == PGRES_POLLING_READING || wanted == PGRES_POLLING_WRITING)
	{
		struct pollfd fd = {.fd = PQcancelSocket(cancel),.events = wanted == PGRES_POLLING_READING ? POLLIN : POLLOUT};

		if (poll(&fd, 1, -1) < 0 && errno != EINTR)
			die("poll: %m");
		wanted = PQcancelPoll(cancel);
	}
	return wanted == PGRES_POLLING_OK;
}

static enum ending
judge(PGcancelConn *cancel, bool delivered, bool bad_object, struct starved starved)
{
	if (!cancel)
		return NULL_OBJECT;
	if (delivered)
		return starved.failures ? DELIVERED_STARVED : DELIVERED;
	if (!has_message(cancel))
		return NO_MESSAGE;
	if (bad_object)
		return BAD_OBJECT;
	PQcancelReset(cancel);
	if (PQcancelBlocking(cancel) == 1)
		return FAILED;
	fprintf(stderr, "not good again: %s", PQcancelErrorMessage(cancel));
	return NOT_AGAIN;
}

static enum ending
cancel_starving(PGconn *session, struct starvation order)
{
	int			before = open_descriptors();
	bool		bad_object;
	bool		delivered = false;
	enum ending ending;
	struct starved starved;
	PGcancelConn *cancel;

	if (!starve_begin(order))
		die("libpqcancel.so is not loaded");
	cancel = PQcancelCreate(session);
	bad_object = PQcancelStatus(cancel) == CONNECTION_BAD;
	if (cancel && !bad_object)
		delivered = deliver(cancel, order.first % 2);
	starved = starve_end();
	ending = judge(cancel, delivered, bad_object, starved);
	PQcancelFinish(cancel);
	return open_descriptors() == before ? ending : LEAKED;
}

/* The same by the old functions. Everything that PQcancel says is in the buffer, and it may be called again. */
static enum ending
cancel_old_starving(PGconn *session, struct starvation order)
{
	int			before = open_descriptors();
	char		errbuf[256] = "";
	bool		delivered;
	struct starved starved;
	PGcancel   *cancel;

	if (!starve_begin(order))
		die("libpqcancel.so is not loaded");
	cancel = PQgetCancel(session);
	delivered = cancel && PQcancel(cancel, errbuf, sizeof(errbuf));
	starved = starve_end();
	if (!cancel)
		return NULL_OBJECT;
	if (!delivered && !strchr(errbuf, '\n'))
		return NO_MESSAGE;
	if (!delivered && !PQcancel(cancel, errbuf, sizeof(errbuf)))
	{
		fprintf(stderr, "not good again: %s", errbuf);
		return NOT_AGAIN;
	}
	PQfreeCancel(cancel);
	if (open_descriptors() != before)
		return LEAKED;
	return !delivered ? FAILED : starved.failures ? DELIVERED_STARVED : DELIVERED;
}

struct job
{
	PGconn	   *session;
	struct starvation order;
	enum ending ending;
};

static void *
run_job(void *argument)
{
	struct job *job = argument;

	job->ending = cancel_starving(job->session, job->order);
	return NULL;
}

static enum ending
cancel_in_thread(PGconn *session, struct starvation order)
{
	struct job	job = {.session = session,.order = order};
	pthread_t	thread;

	if (pthread_create(&thread, NULL, run_job, &job) != 0 || pthread_join(thread, NULL) != 0)
		die("no thread");
	return job.ending;
}

static enum ending
cancel_in_child(PGconn *session, struct starvation order, bool threaded)
{
	int			status;
	pid_t		child = fork();

	if (child < 0)
		die("fork: %m");
	if (child == 0)
	{
		alarm(HANGS_AFTER_SECONDS);
		_exit((int) (threaded ? cancel_in_thread(session, order) : cancel_starving(session, order)));
	}
	while (waitpid(child, &status, 0) < 0)
		if (errno != EINTR)
			die("waitpid: %m");
	if (WIFSIGNALED(status))
		return WTERMSIG(status) == SIGALRM ? HUNG : DIED;
	return WEXITSTATUS(status) < ENDINGS ? (enum ending) WEXITSTATUS(status) : DIED;
}

static void
warm_up(PGconn *session)
{
	PGcancelConn *cancel = PQcancelCreate(session);

	if (PQcancelBlocking(cancel) != 1)
		die("PQcancelBlocking: %s", PQcancelErrorMessage(cancel));
	PQcancelFinish(cancel);
}

static void
report(void)
{
	for (int ending = 0; ending < ENDINGS; ending++)
	{
		printf("%s: %ld", ending_names[ending], tally[ending].count);
		for (int i = 0; i < MAX_LISTED && i < tally[ending].count; i++)
			printf("%s%ld", i == 0 ? " (at " : " ", tally[ending].first[i]);
		printf("%s\n", tally[ending].count == 0 ? "" : tally[ending].count > MAX_LISTED ? " ...)" : ")");
	}
}

int
main(int argc, char **argv)
{
	PGconn	   *session;
	enum ending ending;
	struct starvation order = {0};
	bool		threads;
	bool		forks;
	long		step;

	if (argc < 3)
		die("usage: starving CONNINFO (fork|here|warm|thread|old)-(ours|all)-(on|once) [STEP]");
	if (!starve_begin)
		die("starve.so is not preloaded");
	threads = strstr(argv[2], "thread") != NULL;
	forks = threads || strstr(argv[2], "fork") != NULL;
	order.everybody = strstr(argv[2], "all") != NULL;
	order.once = strstr(argv[2], "once") != NULL;
	step = argc > 3 && atol(argv[3]) > 0 ? atol(argv[3]) : 1;
	session = PQconnectdb(argv[1]);
	if (PQstatus(session) != CONNECTION_OK)
		die("session: %s", PQerrorMessage(session));
	if (threads || strstr(argv[2], "warm"))
		warm_up(session);
	alarm(WATCHDOG_SECONDS);
	for (int sweep = forks ? 1 : 0; sweep < 2; sweep++)
	{
		ending = FAILED;
		for (order.first = 1; ending != DELIVERED; order.first += step)
		{
			ending = forks ? cancel_in_child(session, order, threads)
				: strstr(argv[2], "old") ? cancel_old_starving(session, order) : cancel_starving(session, order);
			if (tally[ending].count < MAX_LISTED)
				tally[ending].first[tally[ending].count] = order.first;
			tally[ending].count++;
		}
	}
	report();
	PQfinish(session);
	return 0;
}
