/*
 * Many threads cancel at once, the program ends while they do, and the machine has nothing left for them.
 *
 * A table of scenarios for driver.c.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "transcript.h"

#include <dlfcn.h>
#include <errno.h>
#include <grp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attempts.h"
#include "process_state.h"
#include "query.h"
#include "session.h"

#define MAX_SESSIONS 64
#define CHILD_SECONDS 300
#define BUSY_THREADS 3
#define STATUS_GIVEN 7
#define NOBODY 65534

/* Many threads, each with a session of its own. */

static pthread_barrier_t all_ready;

struct canceller
{
	pthread_t	thread;
	PGconn	   *session;
	PGcancel   *cancel;
};

static void *
cancel_in_thread(void *argument)
{
	pthread_barrier_wait(&all_ready);
	attempt(((struct canceller *) argument)->cancel);
	return NULL;
}

static void *
cancel_in_handler(void *argument)
{
	handler_cancel = ((struct canceller *) argument)->cancel;
	pthread_barrier_wait(&all_ready);
	raise(SIGUSR1);
	return NULL;
}

static void
cancel_at_once(struct canceller *cancellers, int count, PGconn *monitor, void *(*act) (void *argument))
{
	int			cancelled = 0;

	pthread_barrier_init(&all_ready, NULL, (unsigned) count);
	for (int i = 0; i < count; i++)
		start_query(cancellers[i].session, monitor);
	for (int i = 0; i < count; i++)
		if (pthread_create(&cancellers[i].thread, NULL, act, &cancellers[i]) != 0)
			die("no thread");
	for (int i = 0; i < count; i++)
		pthread_join(cancellers[i].thread, NULL);
	for (int i = 0; i < count; i++)
		cancelled += strcmp(end_of_query(cancellers[i].session), "57014") == 0;
	say("%d of %d cancelled", cancelled, count);
	say_attempts();
	pthread_barrier_destroy(&all_ready);
}

/* NUMBER sessions; first in threads, then in handlers that interrupt them. */
static void
run_many(struct context *context)
{
	struct canceller cancellers[MAX_SESSIONS] = {{.session = context->session}};
	PGconn	   *monitor = connect_monitor();

	for (int i = 0; i < context->number; i++)
	{
		if (i > 0)
			cancellers[i].session = connect_session(context->conninfo);
		cancellers[i].cancel = PQgetCancel(cancellers[i].session);
	}
	attempt_on_signal(NULL);
	cancel_at_once(cancellers, context->number, monitor, cancel_in_thread);
	cancel_at_once(cancellers, context->number, monitor, cancel_in_handler);
	for (int i = 0; i < context->number; i++)
	{
		PQfreeCancel(cancellers[i].cancel);
		if (i > 0)
			PQfinish(cancellers[i].session);
	}
	PQfinish(monitor);
}

/* The end of the process, or of the library, while a cancel is under way. */

static struct
{
	void	   *library;		/* NULL: the program is linked with it */
	PGcancel   *(*get_cancel) (PGconn *session);
	int			(*cancel) (PGcancel *cancel, char *errbuf, int size);
}			functions = {NULL, PQgetCancel, PQcancel};

static atomic_int returned;

static void *
cancel_without_end(void *cancel)
{
	char		errbuf[256];

	for (;;)
	{
		functions.cancel(cancel, errbuf, sizeof(errbuf));
		returned++;
	}
	return NULL;
}

/* An exit handler of the program's that takes its time. It was registered first, so it runs last, after those of libraries. */
static void
take_time(void)
{
	for (volatile int i = 0; i < 10 * 1000 * 1000; i++)
		;
}

static void
leave_by_exit(void)
{
	exit(STATUS_GIVEN);
}

static void
leave_by_quick_exit(void)
{
	quick_exit(STATUS_GIVEN);
}

static void
load_library(void)
{
	functions.library = dlopen(getenv("DRIVER_LIBRARY"), RTLD_NOW | RTLD_LOCAL);
	if (!functions.library)
		die("dlopen: %s", dlerror());
	*(void **) &functions.get_cancel = dlsym(functions.library, "PQgetCancel");
	*(void **) &functions.cancel = dlsym(functions.library, "PQcancel");
	if (!functions.get_cancel || !functions.cancel)
		die("dlsym: %s", dlerror());
}

/* Those that are under way come back after it, and so do some more. */
static void
leave_by_dlclose(void)
{
	int			before;

	if (dlclose(functions.library) != 0)
		die("dlclose: %s", dlerror());
	before = returned;
	if (!getenv("DRIVER_HELD"))
		while (returned < before + 2 * BUSY_THREADS)
			;
	_exit(STATUS_GIVEN);
}

/* Under way: the test's server says so when it holds the cancel; else at another moment each time. */
static void
wait_until_under_way(int repetition)
{
	char		stuck;

	if (!getenv("DRIVER_HELD"))
	{
		while (returned < repetition % 5)
			;
		for (volatile int i = 0; i < repetition * 4000; i++)
			;
	}
	else if (read(atoi(getenv("DRIVER_CONTROL_FD")), &stuck, 1) != 1)
		die("nothing from the test");
}

static _Noreturn void
leave_while_cancelling(PGconn *session, int repetition, void (*leave) (void))
{
	int			threads = getenv("DRIVER_HELD") ? 1 : BUSY_THREADS;
	PGcancel   *cancel;
	pthread_t	thread;

	alarm(CHILD_SECONDS);
	if (atexit(take_time) != 0 || at_quick_exit(take_time) != 0)
		die("atexit: %m");
	if (leave == leave_by_dlclose)
		load_library();
	cancel = functions.get_cancel(session);
	for (int i = 0; i < threads; i++)
		if (pthread_create(&thread, NULL, cancel_without_end, cancel) != 0)
			die("no thread");
	wait_until_under_way(repetition);
	leave();
	abort();
}

/* NUMBER processes. The parent has not used the library, so each begins as a program does. */
static void
run_leaving(struct context *context, void (*leave) (void))
{
	int			as_given = 0;

	for (int i = 0; i < context->number; i++)
	{
		int			status;
		pid_t		child = fork();

		if (child < 0)
			die("fork: %m");
		if (child == 0)
			leave_while_cancelling(context->session, i, leave);
		while (waitpid(child, &status, 0) < 0)
			if (errno != EINTR)
				die("waitpid: %m");
		if (WIFEXITED(status) && WEXITSTATUS(status) == STATUS_GIVEN)
			as_given++;
		else
			say("repetition %d: status %x", i, (unsigned) status);
	}
	say("%d of %d ended with the status given", as_given, context->number);
}

static void
run_exit(struct context *context)
{
	run_leaving(context, leave_by_exit);
}

static void
run_quick_exit(struct context *context)
{
	run_leaving(context, leave_by_quick_exit);
}

static void
run_dlclose(struct context *context)
{
	run_leaving(context, leave_by_dlclose);
}

/* What is short. */

/* The limit does not hold for root. */
static void
become_nobody(void)
{
	if (geteuid() == 0 && (setgroups(0, NULL) < 0 || setgid(NOBODY) < 0 || setuid(NOBODY) < 0))
		die("setuid: %m");
}

/* A process ends with its last thread, too. NUMBER: whether another one stays behind the main thread, and cancels. */
static void *
cancel_later(void *cancel)
{
	for (int i = 0; i < 20; i++)
		attempt(cancel);
	say_attempts();
	return NULL;
}

static void
run_last_thread(struct context *context)
{
	PGcancel   *cancel = PQgetCancel(context->session);
	pthread_t	other;

	attempt(cancel);
	if (context->number == 0)
		say_attempts();
	else if (pthread_create(&other, NULL, cancel_later, cancel) != 0)
		die("no thread");
	pthread_exit(NULL);
}

static void
run_no_thread(struct context *context)
{
	struct rlimit before;
	struct rlimit none;
	PGcancel   *cancel;

	become_nobody();
	if (getrlimit(RLIMIT_NPROC, &before) < 0)
		die("getrlimit: %m");
	none = before;
	none.rlim_cur = 0;
	if (setrlimit(RLIMIT_NPROC, &none) < 0)
		die("setrlimit: %m");
	cancel = PQgetCancel(context->session);
	say("PQgetCancel -> %s", cancel ? "object" : "NULL");
	say("PQcancel -> %d", attempt(cancel));
	say_attempts();
	if (setrlimit(RLIMIT_NPROC, &before) < 0)
		die("setrlimit: %m");
	PQfreeCancel(cancel);
	cancel = PQgetCancel(context->session);
	say("with threads again: PQcancel -> %d", attempt(cancel));
	say_attempts();
	PQfreeCancel(cancel);
}

static void
run_no_descriptor(struct context *context)
{
	struct rlimit before;
	PGcancel   *cancel;

	leave_room(0, &before);
	cancel = PQgetCancel(context->session);
	say("PQcancel -> %d", attempt(cancel));
	say_attempts();
	if (setrlimit(RLIMIT_NOFILE, &before) < 0)
		die("setrlimit: %m");
	say("with descriptors again: PQcancel -> %d", attempt(cancel));
	say_attempts();
	PQfreeCancel(cancel);
}

const struct scenario scenarios[] = {
	{"many", run_many},
	{"exit", run_exit},
	{"quick-exit", run_quick_exit},
	{"dlclose", run_dlclose},
	{"last-thread", run_last_thread},
	{"no-thread", run_no_thread},
	{"no-descriptor", run_no_descriptor},
	{NULL, NULL},
};
