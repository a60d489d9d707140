/*
 * An allocator of the program's own, for LD_PRELOAD: see handler_allocator.c. Weak: without the preload all are NULL.
 */
#ifndef HANDLER_ALLOCATOR_H
#define HANDLER_ALLOCATOR_H

#include <stdbool.h>

/* While it is forbidden, the process is aborted if this thread enters the allocator. */
__attribute__((weak)) void forbid_allocation(bool forbidden);

enum allocator_lock
{
	NOT_HELD, HELD
};

/* Raises SIGUSR1 in this thread, once, when it enters the allocator for the nth time from now. */
__attribute__((weak)) void raise_in_allocator(long nth, enum allocator_lock lock);

/* Has it been raised? If not, it will not be any more. */
__attribute__((weak)) bool raised_in_allocator(void);

#endif
