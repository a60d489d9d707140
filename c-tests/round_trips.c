/*
 * Measures cancels over a slow way.
 *
 *     round_trips CONNINFO REPEATS
 *
 * Prints the time of each PQcancelBlocking in microseconds, one a line.
 */
#define _GNU_SOURCE
#include "transcript.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int
main(int argc, char **argv)
{
	PGconn	   *session;

	if (argc != 3)
		die("usage: round_trips CONNINFO REPEATS");
	alarm(120);
	session = PQconnectdb(argv[1]);
	if (PQstatus(session) != CONNECTION_OK)
		die("session: %s", PQerrorMessage(session));
	for (int i = 0; i < atoi(argv[2]); i++)
	{
		PGcancelConn *cancel = PQcancelCreate(session);
		struct timespec before;
		struct timespec after;

		clock_gettime(CLOCK_MONOTONIC, &before);
		if (PQcancelBlocking(cancel) != 1)
			die("PQcancelBlocking: %s", PQcancelErrorMessage(cancel));
		clock_gettime(CLOCK_MONOTONIC, &after);
		printf("%ld\n", (after.tv_sec - before.tv_sec) * 1000000L + (after.tv_nsec - before.tv_nsec) / 1000);
		PQcancelFinish(cancel);
	}
	PQfinish(session);
	return 0;
}
