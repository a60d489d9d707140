/*
 * The order for a shortage of memory: see starve.c.
 */
#ifndef STARVE_H
#define STARVE_H

#include <stdbool.h>

struct starvation
{
	long		first;			/* the first call that fails, counted from 1 */
	bool		once;			/* only that one fails */
	bool		everybody;		/* not only calls from inside libpqcancel.so count */
};

struct starved
{
	long		calls;
	long		failures;
};

/* Weak: without the preload they are NULL. False: libpqcancel.so is not loaded. */
__attribute__((weak)) bool starve_begin(struct starvation wanted);
__attribute__((weak)) struct starved starve_end(void);

#endif
