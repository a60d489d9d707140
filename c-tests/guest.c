/*
 * What a cancel does to the process around it: descriptors, memory, signals, standard output, passphrases.
 *
 * A table of scenarios for driver.c, in the place of scenarios.c. Prints what it finds in the driver's way (transcript.h),
 * so that it can be compared with libpq 18 where that makes sense.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "transcript.h"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "process_state.h"

/* Polls to the end, without a word, since it is done a thousand times. */
static bool
poll_silently(PGcancelConn *cancel)
{
	PostgresPollingStatusType wanted = PGRES_POLLING_WRITING;

	if (PQcancelStart(cancel) != 1)
		return false;
	while (wanted == PGRES_POLLING_READING || wanted == PGRES_POLLING_WRITING)
	{
		if (!wait_until_ready(PQcancelSocket(cancel), wanted))
			return false;
		wanted = PQcancelPoll(cancel);
	}
	return wanted == PGRES_POLLING_OK;
}

/* One cancel with an object of its own, each time in another way. True: the request was delivered. */
static bool
cancel_somehow(PGconn *session, int way)
{
	PGcancelConn *cancel = PQcancelCreate(session);
	bool		delivered = false;

	switch (way % 4)
	{
		case 0:
			delivered = PQcancelBlocking(cancel) == 1;
			break;
		case 1:
			delivered = poll_silently(cancel);
			break;
		case 2:					/* twice with one object */
			(void) PQcancelBlocking(cancel);
			PQcancelReset(cancel);
			delivered = poll_silently(cancel);
			break;
		case 3:					/* given up in mid-flight */
			if (PQcancelStart(cancel) == 1)
			{
				(void) wait_until_ready(PQcancelSocket(cancel), PGRES_POLLING_WRITING);
				(void) PQcancelPoll(cancel);
			}
			break;
	}
	PQcancelFinish(cancel);
	return delivered;
}

static void
run_descriptors(struct context *context)
{
	char		before[STATE_SIZE];
	char		after[STATE_SIZE];
	int			delivered = 0;

	list_descriptors(before, sizeof(before));
	for (int i = 0; i < context->number; i++)
		delivered += cancel_somehow(context->session, i);
	list_descriptors(after, sizeof(after));
	say("%d cycles, %s delivered, descriptors: %s", context->number,
		delivered == 0 ? "none" : delivered == context->number / 4 * 3 ? "all" : "some",
		strcmp(before, after) == 0 ? "as before" : after);
}

/* The first cycles fill caches; what comes after them must not add up. */
static void
run_memory(struct context *context)
{
	struct mallinfo2 before;
	struct mallinfo2 after;
	char		descriptors_before[STATE_SIZE];
	char		descriptors_after[STATE_SIZE];
	long		resident_before;

	list_descriptors(descriptors_before, sizeof(descriptors_before));
	for (int i = 0; i < context->number / 10; i++)
		(void) cancel_somehow(context->session, i);
	before = mallinfo2();
	resident_before = resident_kilobytes();
	for (int i = 0; i < context->number; i++)
		(void) cancel_somehow(context->session, i);
	after = mallinfo2();
	printf("allocated: %+ld bytes\nresident: %+ld kB\n", (long) (after.uordblks - before.uordblks),
		   resident_kilobytes() - resident_before);
	list_descriptors(descriptors_after, sizeof(descriptors_after));
	printf("descriptors: %s\n", strcmp(descriptors_before, descriptors_after) == 0 ? "as before" : descriptors_after);
}

/* No descriptor free (NUMBER 0), or one for the socket and none for the files of TLS (1); then enough again. */
static void
run_exhausted(struct context *context)
{
	PGcancelConn *cancel = create(context->session);
	PGcancelConn *late;
	struct rlimit before;

	leave_room(context->number, &before);
	late = create(context->session);
	if (start(cancel))
		poll_to_end(cancel);
	reset(cancel);
	blocking(cancel);
	blocking(late);
	if (setrlimit(RLIMIT_NOFILE, &before) < 0)
		die("setrlimit: %m");
	reset(cancel);
	blocking(cancel);
	reset(late);
	if (start(late))
		poll_to_end(late);
	finish(late);
	finish(cancel);
}

/* NUMBER is put into errno before each call: no call may care what it finds there. */
static void
run_errno(struct context *context)
{
	PGcancelConn *cancel;
	PostgresPollingStatusType wanted = PGRES_POLLING_WRITING;

	errno = context->number;
	cancel = PQcancelCreate(context->session);
	errno = context->number;
	if (PQcancelStart(cancel) == 1)
		while (wanted == PGRES_POLLING_READING || wanted == PGRES_POLLING_WRITING)
		{
			if (!wait_until_ready(PQcancelSocket(cancel), wanted))
				die("stuck");
			errno = context->number;
			wanted = PQcancelPoll(cancel);
		}
	say_call("polled", wanted == PGRES_POLLING_OK ? "OK" : "not OK", cancel);
	errno = context->number;
	PQcancelReset(cancel);
	errno = context->number;
	blocking(cancel);
	errno = context->number;
	PQcancelFinish(cancel);
}

static void
ignore_signal(int number)
{
	(void) number;
}

static void
set_timer(long microseconds)
{
	struct itimerval timer = {.it_interval.tv_usec = microseconds,.it_value.tv_usec = microseconds};

	if (setitimer(ITIMER_REAL, &timer, NULL) < 0)
		die("setitimer: %m");
}

/* A signal each half millisecond, without SA_RESTART: every system call that can be interrupted is. */
static void
run_interrupted(struct context *context)
{
	struct sigaction action = {.sa_handler = ignore_signal};
	PGcancelConn *cancel = create(context->session);
	struct timespec before;
	struct timespec after;

	if (sigaction(SIGALRM, &action, NULL) < 0)
		die("sigaction: %m");
	clock_gettime(CLOCK_MONOTONIC, &before);
	set_timer(500);
	for (int i = 0; i < context->number; i++)
	{
		int			result = PQcancelBlocking(cancel);

		say("interrupted: PQcancelBlocking -> %d error=\"%s\"", result, PQcancelErrorMessage(cancel));
		PQcancelReset(cancel);
	}
	set_timer(0);
	clock_gettime(CLOCK_MONOTONIC, &after);
	say("elapsed: %d s", (int) ((double) (after.tv_sec - before.tv_sec) + (double) (after.tv_nsec - before.tv_nsec) / 1e9));
	finish(cancel);
}

/* All that a process has of its own, set to unusual values, must be the same after cancels of every kind. */
static void
run_state(struct context *context)
{
	static char before[STATE_SIZE];
	static char after[STATE_SIZE];
	int			delivered = 0;

	make_state_unusual();
	describe_state(before, sizeof(before));
	for (int way = 0; way < 4; way++)
		delivered += cancel_somehow(context->session, way);
	describe_state(after, sizeof(after));
	say("delivered: %s", delivered == 3 ? "all" : delivered == 0 ? "none" : "some");
	say("state: %s", strcmp(before, after) == 0 ? "as before" : "changed");
	say_difference(before, after);
	signal(SIGPIPE, SIG_DFL);	/* unusual no more: driver.c looks at it in the end */
}

/* Nothing may be written to standard output or error, whatever goes wrong. */
static void
run_quiet(struct context *context)
{
	int			saved[2] = {dup(STDOUT_FILENO), dup(STDERR_FILENO)};
	int			caught = memfd_create("caught", MFD_CLOEXEC);
	struct stat written;
	int			delivered = 0;

	fflush(stdout);
	if (caught < 0 || dup2(caught, STDOUT_FILENO) < 0 || dup2(caught, STDERR_FILENO) < 0)
		die("dup2: %m");
	for (int way = 0; way < 4; way++)
		delivered += cancel_somehow(context->session, way);
	fflush(stdout);
	if (dup2(saved[0], STDOUT_FILENO) < 0 || dup2(saved[1], STDERR_FILENO) < 0 || fstat(caught, &written) < 0)
		die("dup2: %m");
	say("delivered: %s, written: %ld bytes", delivered == 3 ? "all" : delivered == 0 ? "none" : "some", (long) written.st_size);
}

/* Control experiment: writes as a careless program would, after the server has closed. Dies of SIGPIPE. */
static void
run_careless_write(struct context *context)
{
	PGcancelConn *cancel = create(context->session);

	start(cancel);
	(void) wait_until_ready(PQcancelSocket(cancel), PGRES_POLLING_WRITING);
	gate("made");
	for (int i = 0; i < 2; i++)
		if (write(PQcancelSocket(cancel), "x", 1) < 0)
			say("not killed");
	finish(cancel);
}

static int	hook_calls;
static const char *hook_answer;
static bool hook_saw_session;

static int
passphrase_hook(char *buffer, int size, PGconn *conn)
{
	hook_calls++;
	hook_saw_session = conn != NULL && PQuser(conn) != NULL && strcmp(PQuser(conn), "postgres") == 0;
	if (hook_answer && strcmp(hook_answer, "-1") == 0)
		return -1;
	if (hook_answer == NULL || (int) strlen(hook_answer) >= size)
		return 0;
	strcpy(buffer, hook_answer);
	return (int) strlen(hook_answer);
}

/* The session was made with the right answer of the hook. DRIVER_ANSWER is what the hook says to the cancel. */
static void
run_hook(struct context *context, bool polled)
{
	PGcancelConn *cancel;

	say("session: hook called: %s", hook_calls > 0 ? "yes" : "no");
	hook_calls = 0;
	hook_answer = getenv("DRIVER_ANSWER");
	cancel = create(context->session);
	if (!polled)
		blocking(cancel);
	else if (start(cancel))
		poll_to_end(cancel);
	say("hook called: %s, with a connection of the session's user: %s", hook_calls > 0 ? "yes" : "no",
		hook_saw_session ? "yes" : "no");
	finish(cancel);
}

static void
run_hook_polled(struct context *context)
{
	run_hook(context, true);
}

static void
run_hook_blocking(struct context *context)
{
	run_hook(context, false);
}

static void
run_blocking(struct context *context)
{
	PGcancelConn *cancel = create(context->session);

	blocking(cancel);
	finish(cancel);
}

/* Sets the passphrase hooks. */
void
before_session(const char *scenario)
{
	hook_answer = getenv("DRIVER_PASSPHRASE");
	if (strncmp(scenario, "hook-", 5) == 0)
		PQsetSSLKeyPassHook_OpenSSL(passphrase_hook);
	else if (strcmp(scenario, "default-hook") == 0)
		PQsetSSLKeyPassHook_OpenSSL(PQdefaultSSLKeyPassHook_OpenSSL);
}

const struct scenario scenarios[] = {
	{"descriptors", run_descriptors},
	{"memory", run_memory},
	{"exhausted", run_exhausted},
	{"errno", run_errno},
	{"interrupted", run_interrupted},
	{"state", run_state},
	{"quiet", run_quiet},
	{"careless-write", run_careless_write},
	{"hook-polled", run_hook_polled},
	{"hook-blocking", run_hook_blocking},
	{"default-hook", run_blocking},
	{"blocking", run_blocking},
	{NULL, NULL},
};
