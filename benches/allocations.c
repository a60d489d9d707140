/*
 * malloc and its kin, for a whole process: linked into a program, they come before the C library's for all its libraries,
 * too. They hand on to the C library's and count.
 */
#define _GNU_SOURCE
#include "allocations.h"

#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>

/* What glibc calls its own. */
extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *block, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void *block);

static atomic_long calls;
static atomic_long live;
static atomic_long peak;

struct allocations
allocations_now(void)
{
	struct allocations now = {atomic_load(&calls), atomic_load(&live), atomic_load(&peak)};

	atomic_store(&peak, now.live);
	return now;
}

static void
count(long bytes)
{
	long		now = atomic_fetch_add(&live, bytes) + bytes;
	long		before = atomic_load(&peak);

	while (now > before && !atomic_compare_exchange_weak(&peak, &before, now))
		;
}

static void *
counted(void *block)
{
	atomic_fetch_add(&calls, 1);
	if (block)
		count((long) malloc_usable_size(block));
	return block;
}

void *
malloc(size_t size)
{
	return counted(__libc_malloc(size));
}

void *
calloc(size_t number, size_t size)
{
	return counted(__libc_calloc(number, size));
}

void *
realloc(void *block, size_t size)
{
	long		old = block ? (long) malloc_usable_size(block) : 0;
	void	   *moved = __libc_realloc(block, size);

	if (moved || size == 0)
		count(-old);
	return counted(moved);
}

void *
memalign(size_t alignment, size_t size)
{
	return counted(__libc_memalign(alignment, size));
}

void *
aligned_alloc(size_t alignment, size_t size)
{
	return counted(__libc_memalign(alignment, size));
}

int
posix_memalign(void **block, size_t alignment, size_t size)
{
	*block = counted(__libc_memalign(alignment, size));
	return *block ? 0 : ENOMEM;
}

void
free(void *block)
{
	if (block)
		count(-(long) malloc_usable_size(block));
	__libc_free(block);
}
