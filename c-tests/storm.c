/*
 * Signals without end: the program works, a handler that cancels interrupts it wherever it is, NUMBER times.
 *
 * A table of scenarios for driver.c. A thread's next signal is sent when the handler of its last is about to return, or, if
 * that was refused, when the thread has gone on. They come from a process of their own, so that the program has no thread but
 * those that the scenario is about.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "transcript.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <openssl/evp.h>
#include <openssl/ssl.h>

#include "attempts.h"
#include "loaded.h"
#include "process_state.h"
#include "query.h"
#include "session.h"

#define MAX_THREADS 8
#define BLOCKS 64
#define WATCHDOG_SECONDS 3600

struct worker
{
	void		(*work) (struct worker *worker);
	PGconn	   *session;
	pthread_t	thread;
	_Atomic pid_t tid;
	unsigned	random;
	void	   *blocks[BLOCKS];
};

static struct
{
	struct worker workers[MAX_THREADS];
	int			threads;
	int			orders;			/* the sender reads from its other end which thread is next */
	atomic_long unsent;
	atomic_long unhandled;
	long		others;			/* requests that were no attempts */
	const char *conninfo;
	PGcancel   *cancel;
}			storm;

/* Allocates and frees in a tight loop. */
static void
work_allocate(struct worker *worker)
{
	void	  **block;

	worker->random = worker->random * 1103515245 + 12345;
	block = &worker->blocks[worker->random / 65536 % BLOCKS];
	if (worker->random / 4194304 % 8 == 0)
		*block = realloc(*block, 1 + worker->random % 30000);
	else
	{
		free(*block);
		*block = malloc(1 + worker->random % 3000);
	}
	if (!*block)
		die("out of memory");
	*(char *) *block = 1;
}

/* Is inside its own OpenSSL: digests, contexts, certificates. */
static void
work_openssl(struct worker *worker)
{
	unsigned char digest[EVP_MAX_MD_SIZE];
	SSL_CTX    *context = SSL_CTX_new(TLS_client_method());

	(void) worker;
	if (EVP_Digest("abc", 3, digest, NULL, EVP_sha256(), NULL) != 1 || !context ||
		SSL_CTX_load_verify_locations(context, getenv("DRIVER_CERTIFICATES"), NULL) != 1)
		die("OpenSSL does not work");
	SSL_CTX_free(context);
}

void
while_loading(void)
{
}

/* Is inside the loader. */
static void
work_loader(struct worker *worker)
{
	void	   *object = dlopen(getenv("DRIVER_LOADED"), RTLD_NOW);

	(void) worker;
	if (!object || !dlsym(object, "loaded") || dlclose(object) != 0)
		die("dlopen: %s", dlerror());
}

/* Is inside libpqcancel.so itself, and in what that uses: also in a PQcancel, that of the handler comes in between. */
static void
work_cancelling(struct worker *worker)
{
	PGcancelConn *cancel = PQcancelCreate(worker->session);

	attempt(storm.cancel);
	PQfreeCancel(PQgetCancel(worker->session));
	if (PQcancelBlocking(cancel) != 1)
		die("PQcancelBlocking: %s", PQcancelErrorMessage(cancel));
	PQcancelFinish(cancel);
	storm.others++;
}

/* Is inside whatever a session is made with: libpq, and for GSSAPI the very library that the cancel needs. */
static void
work_connecting(struct worker *worker)
{
	PGconn	   *session = connect_session(storm.conninfo);

	(void) worker;
	if (PQstatus(session) != CONNECTION_OK)
		die("session: %s", PQerrorMessage(session));
	PQfinish(session);
}

static void
send_next(pid_t tid)
{
	if (storm.unsent-- > 0 && write(storm.orders, &tid, sizeof(tid)) != sizeof(tid))
		abort();				/* in a handler */
}

/* What the last handler of this thread saw delivered, and whether the next signal waits until the work has gone on. */
static _Thread_local volatile long seen_delivered;
static _Thread_local volatile bool postponed;

/*
 * After a refusal the thread is still inside a lock, and would be there at the next signal, too, again and again. (Of several
 * threads it does not show whose was refused.)
 */
static void
at_end_of_handler(void)
{
	long		delivered = delivered_attempts();

	storm.unhandled--;
	if (storm.threads > 1 || delivered == seen_delivered)
		postponed = true;
	else
		send_next(gettid());
	seen_delivered = delivered;
}

/* Sends the signals that it is told to. */
static pid_t
start_sender(void)
{
	int			ends[2];
	pid_t		process = getpid();
	pid_t		sender;
	pid_t		tid;

	if (pipe2(ends, O_CLOEXEC) < 0 || (sender = fork()) < 0)
		die("fork: %m");
	if (sender > 0)
	{
		close(ends[0]);
		storm.orders = ends[1];
		return sender;
	}
	close(ends[1]);
	while (read(ends[0], &tid, sizeof(tid)) == sizeof(tid))
		syscall(SYS_tgkill, process, tid, SIGUSR1);
	_exit(0);
}

static void *
run_worker(void *argument)
{
	struct worker *worker = argument;

	handler_cancel = storm.cancel;
	worker->tid = gettid();		/* from now on it can be interrupted */
	while (storm.unhandled > 0)
	{
		if (postponed)
		{
			postponed = false;
			send_next(worker->tid);
		}
		worker->work(worker);
	}
	for (int i = 0; i < BLOCKS; i++)
		free(worker->blocks[i]);
	memset(worker->blocks, 0, sizeof(worker->blocks));
	return NULL;
}

/* One thread is the main thread; more are threads of their own, and the main thread waits for them. */
static void
blow(long signals)
{
	storm.unsent = signals;
	storm.unhandled = signals;
	handler_cancel = storm.cancel;
	postponed = false;			/* by the last of the signals before: two at once would become one */
	for (int i = 0; i < storm.threads; i++)
	{
		struct worker *worker = &storm.workers[i];

		worker->tid = 0;
		if (storm.threads == 1)
			worker->tid = gettid();
		else if (pthread_create(&worker->thread, NULL, run_worker, worker) != 0)
			die("no thread");
		while (worker->tid == 0)
			;
	}
	for (int i = 0; i < storm.threads; i++)
		send_next(storm.workers[i].tid);
	if (storm.threads == 1)
		run_worker(storm.workers);
	for (int i = 0; i < storm.threads && storm.threads > 1; i++)
		pthread_join(storm.workers[i].thread, NULL);
	/* What was refused last is still to be closed: it is, when a later one has come through. */
	while (!attempt(storm.cancel))
		;
}

static void
say_growth(long signals)
{
	static char descriptors_before[STATE_SIZE];
	static char descriptors_after[STATE_SIZE];
	struct mallinfo2 before = mallinfo2();
	struct mallinfo2 after;
	long		resident_before = resident_kilobytes();

	list_descriptors(descriptors_before, sizeof(descriptors_before));
	blow(signals);
	after = mallinfo2();
	printf("allocated: %+ld bytes\nresident: %+ld kB\n", (long) (after.uordblks - before.uordblks),
		   resident_kilobytes() - resident_before);
	list_descriptors(descriptors_after, sizeof(descriptors_after));
	say("descriptors: %s", strcmp(descriptors_before, descriptors_after) == 0 ? "as before" : descriptors_after);
}

static void
run_storm(struct context *context, void (*work) (struct worker *worker), int threads)
{
	pid_t		sender = start_sender();
	PGconn	   *monitor = connect_monitor();

	alarm(WATCHDOG_SECONDS);
	storm.cancel = PQgetCancel(context->session);
	storm.conninfo = context->conninfo;
	storm.threads = threads;
	for (int i = 0; i < threads; i++)
		storm.workers[i] = (struct worker) {.work = work,.session = context->session,.random = (unsigned) i};
	attempt_on_signal(at_end_of_handler);
	blow(context->number / 10 + 1);
	say_attempts();
	say_growth(context->number);
	say_attempts();
	/* After all that, a handler still does what it is there for. */
	attempt_on_signal(NULL);
	start_query(context->session, monitor);
	raise(SIGUSR1);
	say("query: %s", end_of_query(context->session));
	say_attempts();
	say("other requests: %ld", storm.others);
	PQfreeCancel(storm.cancel);
	PQfinish(monitor);
	close(storm.orders);
	waitpid(sender, NULL, 0);
}

static void
run_allocate(struct context *context)
{
	run_storm(context, work_allocate, 1);
}

static void
run_allocate_threads(struct context *context)
{
	run_storm(context, work_allocate, MAX_THREADS);
}

static void
run_openssl(struct context *context)
{
	run_storm(context, work_openssl, 1);
}

static void
run_loader(struct context *context)
{
	run_storm(context, work_loader, 1);
}

static void
run_connecting(struct context *context)
{
	run_storm(context, work_connecting, 1);
}

static void
run_cancelling(struct context *context)
{
	run_storm(context, work_cancelling, 1);
}

const struct scenario scenarios[] = {
	{"allocate", run_allocate},
	{"allocate-threads", run_allocate_threads},
	{"openssl", run_openssl},
	{"loader", run_loader},
	{"cancelling", run_cancelling},
	{"connecting", run_connecting},
	{NULL, NULL},
};
