/*
 * A libpq as there may be one day: libpq 18 but for its version, and for its struct pg_cancel, which is another.
 *
 * Linked with all of libpq 18, whose functions of these names are called libpq18_*.
 */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include <libpq-fe.h>

PGcancel   *libpq18_PQgetCancel(PGconn *conn);
int			libpq18_PQcancel(PGcancel *cancel, char *errbuf, int errbufsize);

#define VERSION 190000
#define LENGTH 160				/* where libpq 18 has the packet, which begins with its length */
#define MOVED 8					/* bytes that stand before it here */

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

PGcancel *
PQgetCancel(PGconn *conn)
{
	char	   *block = (char *) libpq18_PQgetCancel(conn);
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
	char		block[1024] = {0};
	const char *moved = (const char *) cancel;

	memcpy(block, moved, LENGTH);
	memcpy(block + LENGTH, moved + LENGTH + MOVED, block_size(moved + MOVED) - LENGTH);
	return libpq18_PQcancel((PGcancel *) block, errbuf, errbufsize);
}

void
PQfreeCancel(PGcancel *cancel)
{
	free(cancel);
}
