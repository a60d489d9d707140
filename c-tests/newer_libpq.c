/*
 * A libpq as there may be one day: libpq 18 but for its version, and for its struct pg_cancel, which is another.
 *
 * Linked with a real libpq 18, it takes the place of libpq.so.5.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include <libpq-fe.h>

#define VERSION 190000
#define LENGTH 160				/* where libpq 18 has the packet, which begins with its length */
#define MOVED 8					/* bytes that stand before it here */

static void *
next(const char *name)
{
	void	   *function = dlsym(RTLD_NEXT, name);

	if (!function)
		abort();
	return function;
}

static size_t
block_size(const char *block)
{
	unsigned char length[4];

	memcpy(length, block + LENGTH, sizeof(length));
	return LENGTH + (size_t) (length[2] << 8 | length[3]);
}

int
PQlibVersion(void)
{
	return VERSION;
}

/* So that this object is the libpq, and not the one behind it. */
PQconninfoOption *
PQconninfo(PGconn *conn)
{
	PQconninfoOption *(*real) (PGconn *) = (PQconninfoOption * (*) (PGconn *)) next("PQconninfo");

	return real(conn);
}

PGcancel *
PQgetCancel(PGconn *conn)
{
	PGcancel   *(*real) (PGconn *) = (PGcancel * (*) (PGconn *)) next("PQgetCancel");
	char	   *block = (char *) real(conn);
	size_t		size = block ? block_size(block) : 0;
	char	   *moved = calloc(1, size + MOVED);

	if (!block || !moved)
		abort();
	memcpy(moved, block, LENGTH);
	memcpy(moved + LENGTH + MOVED, block + LENGTH, size - LENGTH);
	free(block);
	return (PGcancel *) moved;
}

int
PQcancel(PGcancel *cancel, char *errbuf, int errbufsize)
{
	int			(*real) (PGcancel *, char *, int) = (int (*) (PGcancel *, char *, int)) next("PQcancel");
	char		block[1024] = {0};
	const char *moved = (const char *) cancel;

	memcpy(block, moved, LENGTH);
	memcpy(block + LENGTH, moved + LENGTH + MOVED, block_size(moved + MOVED) - LENGTH);
	return real((PGcancel *) block, errbuf, errbufsize);
}

void
PQfreeCancel(PGcancel *cancel)
{
	free(cancel);
}
