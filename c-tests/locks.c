/*
 * A handler that cancels interrupts the program while it holds a lock that somebody may want who carries the cancel.
 *
 * A table of scenarios for driver.c. Most run a query, provoke the signal inside the lock, and then show whether what
 * PQcancel returned is true: the query was cancelled, or it was not and is not later. CONNINFO is used twice: the second
 * session is there to be cancelled after the first.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "transcript.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <openssl/crypto.h>
#include <openssl/x509_vfy.h>

#include "attempts.h"
#include "handler_allocator.h"
#include "loaded.h"
#include "query.h"
#include "session.h"

static void
raise_without_lock(void)
{
	raise(SIGUSR1);
}

/* One that the compiler does not see through. */
static void
allocate(void)
{
	void	   *volatile block = malloc(1);

	free(block);
}

static void
raise_in_own_allocator(void)
{
	raise_in_allocator(1, HELD);
	allocate();
	if (!raised_in_allocator())
		die("handler_allocator.so is not preloaded");
}

/* The loader's. */

static bool loading_raises;

void
while_loading(void)
{
	if (loading_raises)
		raise(SIGUSR1);
	loading_raises = false;
}

static void
raise_in_constructor(void)
{
	void	   *object;

	loading_raises = true;
	object = dlopen(getenv("DRIVER_LOADED"), RTLD_NOW);
	if (!object || loading_raises || dlclose(object) != 0)
		die("dlopen: %s", dlerror());
}

static int
raise_for_object(struct dl_phdr_info *info, size_t size, void *unused)
{
	(void) info;
	(void) size;
	(void) unused;
	raise(SIGUSR1);
	return 1;					/* enough */
}

static void
raise_in_iteration(void)
{
	dl_iterate_phdr(raise_for_object, NULL);
}

/* The program's OpenSSL's, which is libpq's too. */

static pthread_mutex_t openssl_lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local bool openssl_raises;

static void *
openssl_realloc(void *block, size_t size, const char *file, int line)
{
	void	   *made;

	(void) file;
	(void) line;
	pthread_mutex_lock(&openssl_lock);
	if (openssl_raises)
		raise(SIGUSR1);
	openssl_raises = false;
	made = realloc(block, size);
	pthread_mutex_unlock(&openssl_lock);
	return made;
}

static void *
openssl_malloc(size_t size, const char *file, int line)
{
	return openssl_realloc(NULL, size, file, line);
}

static void
openssl_free(void *block, const char *file, int line)
{
	(void) file;
	(void) line;
	free(block);
}

static void
raise_in_openssl_memory(void)
{
	openssl_raises = true;
	OPENSSL_free(OPENSSL_malloc(1));
	if (openssl_raises)
		die("OpenSSL does not allocate with our functions");
}

static void
raise_in_openssl_store(void)
{
	X509_STORE *store = X509_STORE_new();

	if (!store || X509_STORE_lock(store) != 1)
		die("no X509_STORE");
	raise(SIGUSR1);
	X509_STORE_unlock(store);
	X509_STORE_free(store);
}

/* One query, one signal, and the truth about it. */
static void
raise_during_query(struct context *context, void (*raise_inside) (void))
{
	PGconn	   *monitor = connect_monitor();
	PGconn	   *other = connect_session(context->conninfo);
	PGcancel   *cancel_other = PQgetCancel(other);
	bool		delivered;

	handler_cancel = PQgetCancel(context->session);
	attempt_on_signal(NULL);
	start_query(context->session, monitor);
	raise_inside();
	delivered = delivered_attempts() == 1;
	say("in the lock: PQcancel -> %d", delivered);
	/* The lock is free again. What is posted later is sent later, so when this is through the first has come or never will. */
	say("afterwards: PQcancel -> %d", attempt(cancel_other));
	if (!delivered)
	{
		say("query: %s", query_runs(context->session, monitor) ? "runs on" : "has ended");
		say("again: PQcancel -> %d", attempt(handler_cancel));
	}
	say("query: %s", end_of_query(context->session));
	say_attempts();
	PQfreeCancel(cancel_other);
	PQfreeCancel(handler_cancel);
	PQfinish(other);
	PQfinish(monitor);
}

static void
run_no_lock(struct context *context)
{
	raise_during_query(context, raise_without_lock);
}

static void
run_allocator(struct context *context)
{
	raise_during_query(context, raise_in_own_allocator);
}

static void
run_constructor(struct context *context)
{
	raise_during_query(context, raise_in_constructor);
}

static void
run_iteration(struct context *context)
{
	raise_during_query(context, raise_in_iteration);
}

static void
run_openssl_memory(struct context *context)
{
	raise_during_query(context, raise_in_openssl_memory);
}

static void
run_openssl_store(struct context *context)
{
	raise_during_query(context, raise_in_openssl_store);
}

/* Inside libpqcancel.so, which may hold locks of its own and of its OpenSSL's where it allocates: at its 1st allocation, its
 * 2nd, 4th, 8th and so on until there are no more. NUMBER 1: with the allocator's lock held, too. Says how many requests were
 * delivered apart from the attempts. */

static bool
get_cancel(PGconn *session)
{
	PQfreeCancel(PQgetCancel(session));
	return false;
}

static bool
cancel_blocking(PGconn *session)
{
	PGcancelConn *cancel = PQcancelCreate(session);
	bool		delivered = PQcancelBlocking(cancel) == 1;

	PQcancelFinish(cancel);
	return delivered;
}

/* False: the nth allocation did not come. */
static bool
raise_within(struct context *context, bool (*call) (PGconn *session), long nth)
{
	int			others;
	bool		raised;

	raise_in_allocator(nth, context->number ? HELD : NOT_HELD);
	others = call(context->session);
	raised = raised_in_allocator();
	printf("after allocation %ld: PQcancel -> %d, other requests: %d\n", nth, attempt(handler_cancel), others);
	say_attempts();
	return raised;
}

static void
run_within(struct context *context, bool (*call) (PGconn *session))
{
	handler_cancel = PQgetCancel(context->session);
	attempt_on_signal(NULL);
	for (long nth = 1; raise_within(context, call, nth); nth *= 2)
		;
	PQfreeCancel(handler_cancel);
}

static void
run_within_get_cancel(struct context *context)
{
	run_within(context, get_cancel);
}

static void
run_within_blocking(struct context *context)
{
	cancel_blocking(context->session);
	say("other requests: 1");
	run_within(context, cancel_blocking);
}

/* Each in a process that has not cancelled before: OpenSSL initializes itself. */
static void
run_within_first_blocking(struct context *context)
{
	int			status = 0;

	for (long nth = 1; status == 0; nth *= 2)
	{
		pid_t		child = fork();

		if (child == 0)
		{
			handler_cancel = PQgetCancel(context->session);
			attempt_on_signal(NULL);
			_exit(raise_within(context, cancel_blocking, nth) ? 0 : 1);
		}
		if (child < 0 || waitpid(child, &status, 0) < 0)
			die("fork: %m");
	}
	if (!WIFEXITED(status))
		say("child: status %x", (unsigned) status);
}

/* NUMBER handlers, one after the other, whatever becomes of them. */
static void
run_handler(struct context *context)
{
	handler_cancel = PQgetCancel(context->session);
	attempt_on_signal(NULL);
	for (int i = 0; i < context->number; i++)
		raise(SIGUSR1);
	say_attempts();
	PQfreeCancel(handler_cancel);
}

/* Control experiment: a handler that allocates. */
static void
run_careless(struct context *context)
{
	(void) context;
	forbid_allocation(true);
	allocate();
}

/* OpenSSL takes other functions for its memory only before it has used its own. */
void
before_session(const char *scenario)
{
	if (strcmp(scenario, "openssl-memory") == 0 &&
		CRYPTO_set_mem_functions(openssl_malloc, openssl_realloc, openssl_free) != 1)
		die("OpenSSL has allocated already");
}

const struct scenario scenarios[] = {
	{"no-lock", run_no_lock},
	{"allocator", run_allocator},
	{"spinning-allocator", run_allocator},
	{"constructor", run_constructor},
	{"iteration", run_iteration},
	{"openssl-memory", run_openssl_memory},
	{"openssl-store", run_openssl_store},
	{"within-get-cancel", run_within_get_cancel},
	{"within-blocking", run_within_blocking},
	{"within-first-blocking", run_within_first_blocking},
	{"handler", run_handler},
	{"careless", run_careless},
	{NULL, NULL},
};
