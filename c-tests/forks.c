/*
 * Children of programs that cancel, which cancel too.
 *
 * A table of scenarios for driver.c. Every process tells of its own attempts.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "transcript.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attempts.h"
#include "process_state.h"
#include "query.h"
#include "session.h"

#define CHILD_SECONDS 300
#define LONG_FORK_MS 1500
#define THREADS 8

/* What a child may be given. */
struct family
{
	struct context *context;
	PGcancel   *cancel;			/* the parent's, of the session */
	const char *descriptors;
};

static void
wait_for(pid_t child)
{
	int			status;

	while (waitpid(child, &status, 0) < 0)
		if (errno != EINTR)
			die("waitpid: %m");
	if (WIFSIGNALED(status))
		say("child: killed by signal %d (%s)", WTERMSIG(status), strsignal(WTERMSIG(status)));
	else if (WEXITSTATUS(status) != 0)
		say("child: exit status %d", WEXITSTATUS(status));
}

/* The child does what it is there for, says what came of it, and ends as programs do, by exit(). */
static pid_t
start_child(void (*act) (struct family *family), struct family *family)
{
	pid_t		child = fork();

	if (child < 0)
		die("fork: %m");
	if (child > 0)
		return child;
	alarm(CHILD_SECONDS);
	forget_attempts();
	act(family);
	say_attempts();
	exit(0);
}

static void
with_parents_cancel(struct family *family)
{
	attempt(family->cancel);
	PQfreeCancel(family->cancel);
}

static void
with_cancel_of_parents_session(struct family *family)
{
	PGcancel   *cancel = PQgetCancel(family->context->session);

	attempt(cancel);
	PQfreeCancel(cancel);
}

static void
with_own_session(struct family *family)
{
	PGconn	   *monitor = connect_monitor();
	PGconn	   *session = connect_session(family->context->conninfo);
	PGcancel   *cancel = PQgetCancel(session);

	start_query(session, monitor);
	attempt(cancel);
	say("child's query: %s", end_of_query(session));
	PQfreeCancel(cancel);
	PQfinish(session);
	PQfinish(monitor);
}

static void
in_grandchild(struct family *family)
{
	wait_for(start_child(with_parents_cancel, family));
	with_parents_cancel(family);
}

/* The session's query is cancelled by a child, and the next one by the parent. NUMBER 1: the parent has cancelled before. */
static void
run_child(struct context *context, void (*act) (struct family *family), bool cancels_parents)
{
	PGconn	   *monitor = connect_monitor();
	struct family family = {.context = context,.cancel = PQgetCancel(context->session)};

	if (context->number)
		attempt(family.cancel);
	if (cancels_parents)
		start_query(context->session, monitor);
	wait_for(start_child(act, &family));
	if (cancels_parents)
		say("query: %s", end_of_query(context->session));
	start_query(context->session, monitor);
	attempt(family.cancel);
	say("next query: %s", end_of_query(context->session));
	say_attempts();
	PQfreeCancel(family.cancel);
	PQfinish(monitor);
}

static void
run_parents_cancel(struct context *context)
{
	run_child(context, with_parents_cancel, true);
}

static void
run_parents_session(struct context *context)
{
	run_child(context, with_cancel_of_parents_session, true);
}

static void
run_own_session(struct context *context)
{
	run_child(context, with_own_session, false);
}

static void
run_grandchild(struct context *context)
{
	run_child(context, in_grandchild, true);
}

static void
many_times(struct family *family)
{
	for (int i = 0; i < family->context->number; i++)
		attempt(family->cancel);
}

/* Parent and child cancel at once, NUMBER times each. */
static void
run_at_once(struct context *context)
{
	struct family family = {.context = context,.cancel = PQgetCancel(context->session)};
	pid_t		child;

	attempt(family.cancel);
	child = start_child(many_times, &family);
	many_times(&family);
	wait_for(child);
	say_attempts();
	PQfreeCancel(family.cancel);
}

static atomic_bool over;

static void *
allocate_and_cancel(void *argument)
{
	struct family *family = argument;

	while (!over)
	{
		for (size_t size = 1; size < 3000; size += 100)
		{
			void	   *volatile block = malloc(size);

			free(block);
			PQfreeCancel(PQgetCancel(family->context->session));
		}
		attempt(family->cancel);
	}
	return NULL;
}

static void
every_way(struct family *family)
{
	PGcancelConn *cancel = PQcancelCreate(family->context->session);
	int			delivered;

	with_parents_cancel(family);
	with_cancel_of_parents_session(family);
	delivered = PQcancelBlocking(cancel);
	printf("child's other requests: %d\n%s", delivered, PQcancelErrorMessage(cancel));
	PQcancelFinish(cancel);
}

/* NUMBER children of a program with 8 threads that allocate and cancel. */
static void
run_threads(struct context *context)
{
	struct family family = {.context = context,.cancel = PQgetCancel(context->session)};
	pthread_t	threads[THREADS];

	for (int i = 0; i < THREADS; i++)
		if (pthread_create(&threads[i], NULL, allocate_and_cancel, &family) != 0)
			die("no thread");
	for (int i = 0; i < context->number; i++)
		wait_for(start_child(every_way, &family));
	over = true;
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	say_attempts();
	PQfreeCancel(family.cancel);
}

static void *
cancel_once(void *cancel)
{
	attempt(cancel);
	return NULL;
}

/* A cancel that does not come to its end before the gate "on" is passed; returns when it is under way. */
static pthread_t
start_held_attempt(PGcancel *cancel)
{
	pthread_t	thread;
	char		stuck;

	if (pthread_create(&thread, NULL, cancel_once, cancel) != 0)
		die("no thread");
	if (read(atoi(getenv("DRIVER_CONTROL_FD")), &stuck, 1) != 1)
		die("nothing from the test");
	return thread;
}

static void
compare_and_cancel(struct family *family)
{
	static char descriptors[STATE_SIZE];

	list_descriptors(descriptors, sizeof(descriptors));
	say("child's descriptors: %s", strcmp(descriptors, family->descriptors) == 0 ? "as before" : descriptors);
	with_parents_cancel(family);
}

static void
run_in_flight(struct context *context)
{
	static char before[STATE_SIZE];
	struct family family = {.context = context,.descriptors = before};
	pthread_t	thread;

	list_descriptors(before, sizeof(before));
	family.cancel = PQgetCancel(context->session);
	thread = start_held_attempt(family.cancel);
	wait_for(start_child(compare_and_cancel, &family));
	gate("on");
	pthread_join(thread, NULL);
	attempt(family.cancel);
	say_attempts();
	PQfreeCancel(family.cancel);
}

/* What a program finds open that is run by popen() and by fork() and exec(). */
static void
list_over_exec(char *to, size_t size)
{
	static char *const arguments[] = {"ls", "/proc/self/fd", NULL};
	int			ends[2];
	FILE	   *listing = popen("ls /proc/self/fd", "r");
	size_t		length;
	pid_t		child;

	if (!listing || pipe(ends) < 0)
		die("popen: %m");
	length = fread(to, 1, size - 1, listing);
	pclose(listing);
	child = fork();
	if (child == 0)
	{
		dup2(ends[1], STDOUT_FILENO);
		close(ends[0]);
		close(ends[1]);
		execvp(arguments[0], arguments);
		_exit(127);
	}
	close(ends[1]);
	listing = fdopen(ends[0], "r");
	length += fread(to + length, 1, size - 1 - length, listing);
	fclose(listing);
	to[length] = '\0';
	wait_for(child);
}

static void
run_exec(struct context *context)
{
	static char before[STATE_SIZE];
	static char during[STATE_SIZE];
	PGcancel   *cancel;
	pthread_t	thread;

	list_over_exec(before, sizeof(before));
	cancel = PQgetCancel(context->session);
	thread = start_held_attempt(cancel);
	list_over_exec(during, sizeof(during));
	say("over exec: %s", strcmp(before, during) == 0 ? "as before" : during);
	gate("on");
	pthread_join(thread, NULL);
	say_attempts();
	PQfreeCancel(cancel);
}

static PGcancel *forks_cancel;

static void
cancel_within(void)
{
	attempt(forks_cancel);
}

static pthread_t other_thread;

/* As a fork does in a process with very much memory. */
static void
take_long(void)
{
	if (pthread_create(&other_thread, NULL, cancel_once, forks_cancel) != 0)
		die("no thread");
	poll(NULL, 0, LONG_FORK_MS);
}

/* Something happens during a fork. (Of the handlers before a fork the one that was registered last is called first.) */
static void
run_during_fork(struct context *context, void (*event) (void))
{
	struct family family = {.context = context};

	pthread_atfork(event, NULL, NULL);
	family.cancel = forks_cancel = PQgetCancel(context->session);
	wait_for(start_child(with_parents_cancel, &family));
	if (other_thread)
		pthread_join(other_thread, NULL);
	say_attempts();
	PQfreeCancel(family.cancel);
}

static void
run_within(struct context *context)
{
	run_during_fork(context, cancel_within);
}

static void
run_long_fork(struct context *context)
{
	run_during_fork(context, take_long);
}

const struct scenario scenarios[] = {
	{"parents-cancel", run_parents_cancel},
	{"parents-session", run_parents_session},
	{"own-session", run_own_session},
	{"grandchild", run_grandchild},
	{"at-once", run_at_once},
	{"threads", run_threads},
	{"within", run_within},
	{"long-fork", run_long_fork},
	{"in-flight", run_in_flight},
	{"exec", run_exec},
	{NULL, NULL},
};
