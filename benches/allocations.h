/*
 * Counts what a process allocates, wherever in it: see allocations.c.
 */
#ifndef ALLOCATIONS_H
#define ALLOCATIONS_H

struct allocations
{
	long		calls;			/* of malloc and its kin; realloc is one */
	long		live;			/* bytes in use now */
	long		peak;			/* the most that were in use at once */
};

/* Missing (weak) in a program that is not linked with allocations.c. The peak begins anew with every call. */
extern struct allocations allocations_now(void) __attribute__((weak));

#endif
