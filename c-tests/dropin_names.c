/*
 * Tells which object each name stands for, by three ways to look it up.
 *
 *     dropin_names VERSION NAME...
 *
 * One line for each name: what a handle of libpq.so.5 has; what the global scope has, after the library was added to it; and
 * what the handle has of this version, unless VERSION is empty. Compiled with -DLINKED it is a program linked with libpq,
 * so that the library is in the global scope from the beginning.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#include <libpq-fe.h>

static void
tell(void *symbol)
{
	Dl_info		info;

	printf(" %s", symbol && dladdr(symbol, &info) ? info.dli_fname : "-");
}

#ifdef LINKED
#define SCOPE RTLD_LOCAL

/* In no header any more, but exported; the program has a copy of it. */
extern char *const pgresStatus[];

static void
use_libpq(void)
{
	printf("linked with %d: %s %s\n", PQlibVersion(), PQresStatus(PGRES_TUPLES_OK), pgresStatus[PGRES_TUPLES_OK]);
}
#else
#define SCOPE RTLD_GLOBAL

static void
use_libpq(void)
{
}
#endif

int
main(int argc, char **argv)
{
	void	   *libpq = dlopen("libpq.so.5", RTLD_NOW | SCOPE);

	if (!libpq)
	{
		fprintf(stderr, "%s\n", dlerror());
		return EXIT_FAILURE;
	}
	use_libpq();
	for (int i = 2; i < argc; i++)
	{
		printf("%s", argv[i]);
		tell(dlsym(libpq, argv[i]));
		tell(dlsym(RTLD_DEFAULT, argv[i]));
		tell(argv[1][0] ? dlvsym(libpq, argv[i], argv[1]) : NULL);
		putchar('\n');
	}
	return EXIT_SUCCESS;
}
