/*
 * An allocator of the program's own, for LD_PRELOAD: one lock for all threads, as simple ones have. It aborts the process
 * where PQcancel enters it in the thread that has called PQcancel, and raises a signal on order while it holds the lock.
 * -DSPINS makes it a lock that nobody sleeps on.
 */
#define _GNU_SOURCE
#include "handler_allocator.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What glibc calls its own. */
extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *block, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void *block);

/* The allocator cannot wait for the loader to allocate a thread's variables. */
#define PER_THREAD _Thread_local __attribute__((tls_model("initial-exec")))

#ifdef SPINS
static atomic_flag one_lock = ATOMIC_FLAG_INIT;

static void
take_lock(void)
{
	while (atomic_flag_test_and_set(&one_lock))
		;
}

static void
release_lock(void)
{
	atomic_flag_clear(&one_lock);
}
#else
static pthread_mutex_t one_lock = PTHREAD_MUTEX_INITIALIZER;

static void
take_lock(void)
{
	pthread_mutex_lock(&one_lock);
}

static void
release_lock(void)
{
	pthread_mutex_unlock(&one_lock);
}
#endif

static PER_THREAD volatile bool is_forbidden;
static PER_THREAD volatile long calls_to_go;
static PER_THREAD enum allocator_lock raised_with;

void
forbid_allocation(bool forbidden)
{
	is_forbidden = forbidden;
}

void
raise_in_allocator(long nth, enum allocator_lock lock)
{
	raised_with = lock;
	calls_to_go = nth;
}

bool
raised_in_allocator(void)
{
	bool		raised = calls_to_go == 0;

	calls_to_go = 0;
	return raised;
}

static void
enter(const char *function)
{
	bool		raises;

	if (is_forbidden)
	{
		static const char text[] = " was called in the thread that is in PQcancel\n";

		is_forbidden = false;
		if (write(STDERR_FILENO, function, strlen(function)) > 0 && write(STDERR_FILENO, text, sizeof(text) - 1) > 0)
			abort();
		_exit(4);
	}
	raises = calls_to_go > 0 && --calls_to_go == 0;
	if (raises && raised_with == NOT_HELD)
		raise(SIGUSR1);
	take_lock();
	if (raises && raised_with == HELD)
		raise(SIGUSR1);
}

static void *
leave(void *block)
{
	release_lock();
	return block;
}

void *
malloc(size_t size)
{
	enter("malloc");
	return leave(__libc_malloc(size));
}

void *
calloc(size_t count, size_t size)
{
	enter("calloc");
	return leave(__libc_calloc(count, size));
}

void *
realloc(void *block, size_t size)
{
	enter("realloc");
	return leave(__libc_realloc(block, size));
}

void *
memalign(size_t alignment, size_t size)
{
	enter("memalign");
	return leave(__libc_memalign(alignment, size));
}

void *
aligned_alloc(size_t alignment, size_t size)
{
	enter("aligned_alloc");
	return leave(__libc_memalign(alignment, size));
}

int
posix_memalign(void **block, size_t alignment, size_t size)
{
	void	   *made;

	enter("posix_memalign");
	made = leave(__libc_memalign(alignment, size));
	if (!made)
		return ENOMEM;
	*block = made;
	return 0;
}

void
free(void *block)
{
	enter("free");
	__libc_free(block);
	leave(NULL);
}
