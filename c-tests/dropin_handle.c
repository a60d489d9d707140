/*
 * libpq's functions by the handle of dlopen: see dropin_handle.h.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdlib.h>

#include "transcript.h"

static void *libpq;

void *
in_handle(const char *name)
{
	const char *file = getenv("DROPIN_OPENS");
	void	   *symbol;

	if (!libpq)
	{
		libpq = dlopen(file ? file : "libpq.so.5", RTLD_NOW | RTLD_LOCAL);
		if (getenv("DROPIN_BESIDE") && !dlopen(getenv("DROPIN_BESIDE"), RTLD_NOW | RTLD_LOCAL))
			die("%s", dlerror());
	}
	symbol = libpq ? dlsym(libpq, name) : NULL;
	if (!symbol)
		die("%s", dlerror());
	return symbol;
}

void
close_handle(void)
{
	if (!libpq || dlclose(libpq) != 0)
		die("dlclose: %s", dlerror());
	libpq = NULL;
}
