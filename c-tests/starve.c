/*
 * A shortage of memory on order, for LD_PRELOAD: malloc and its kin fail from a certain call on, or at one call only.
 *
 * Only calls between starve_begin() and starve_end() count: those from inside libpqcancel.so, or (everybody) all of the
 * process, which are the C library's, the loader's and the host libpq's too.
 */
#define _GNU_SOURCE
#include "starve.h"

#include <errno.h>
#include <link.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* What glibc calls its own. */
extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *block, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);

static struct starvation order;
static bool starving;
static long calls;
static long failures;
static uintptr_t library_begin;
static uintptr_t library_end;

static int
find_library(struct dl_phdr_info *info, size_t size, void *unused)
{
	(void) size;
	(void) unused;
	if (!strstr(info->dlpi_name, "libpqcancel"))
		return 0;
	library_begin = info->dlpi_addr;
	for (int i = 0; i < info->dlpi_phnum; i++)
	{
		uintptr_t	end = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz;

		if (info->dlpi_phdr[i].p_type == PT_LOAD && end > library_end)
			library_end = end;
	}
	return 1;
}

bool
starve_begin(struct starvation wanted)
{
	if (!library_end && !dl_iterate_phdr(find_library, NULL))
		return false;
	order = wanted;
	calls = 0;
	failures = 0;
	starving = true;
	return true;
}

struct starved
starve_end(void)
{
	starving = false;
	return (struct starved) {.calls = calls,.failures = failures};
}

/* Is this call one that counts, and one that has to fail? */
static bool
fails(void *caller)
{
	uintptr_t	address = (uintptr_t) caller;

	if (!starving || !(order.everybody || (address >= library_begin && address < library_end)))
		return false;
	calls++;
	if (calls < order.first || (order.once && calls > order.first))
		return false;
	failures++;
	errno = ENOMEM;
	return true;
}

void *
malloc(size_t size)
{
	return fails(__builtin_return_address(0)) ? NULL : __libc_malloc(size);
}

void *
calloc(size_t count, size_t size)
{
	return fails(__builtin_return_address(0)) ? NULL : __libc_calloc(count, size);
}

void *
realloc(void *block, size_t size)
{
	return fails(__builtin_return_address(0)) ? NULL : __libc_realloc(block, size);
}

void *
memalign(size_t alignment, size_t size)
{
	return fails(__builtin_return_address(0)) ? NULL : __libc_memalign(alignment, size);
}

void *
aligned_alloc(size_t alignment, size_t size)
{
	return fails(__builtin_return_address(0)) ? NULL : __libc_memalign(alignment, size);
}

int
posix_memalign(void **block, size_t alignment, size_t size)
{
	void	   *made = fails(__builtin_return_address(0)) ? NULL : __libc_memalign(alignment, size);

	if (!made)
		return ENOMEM;
	*block = made;
	return 0;
}
