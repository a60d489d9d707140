/*
 * Cancels when it is told to: a process that lives through what a test changes around it.
 *
 *     on_demand CONNINFO
 *
 * Makes a session, says "ready", and for each line of standard input cancels what the session does (which is nothing) with
 * an object of its own, and says what came of it. Each of its answers ends in a line with a dot.
 */
#define _GNU_SOURCE
#include "transcript.h"

#include <stdio.h>

#include "session.h"

static void
cancel(PGconn *session)
{
	PGcancelConn *cancel = PQcancelCreate(session);
	int			result = PQcancelBlocking(cancel);

	printf("%d %s\n.\n", result, PQcancelErrorMessage(cancel));
	fflush(stdout);
	PQcancelFinish(cancel);
}

int
main(int argc, char **argv)
{
	PGconn	   *session;
	char		line[8];

	if (argc != 2)
		die("usage: on_demand CONNINFO");
	session = connect_session(argv[1]);
	if (PQstatus(session) != CONNECTION_OK)
		die("session: %s", PQerrorMessage(session));
	printf("ready\n.\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin))
		cancel(session);
	PQfinish(session);
	return 0;
}
