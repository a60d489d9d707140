/*
 * The program that is run over libpq 18 and over pqcancel, and must print the same over both.
 *
 *     driver CONNINFO SCENARIO [NUMBER]
 *
 * CONNINFO is the session's; DRIVER_MONITOR holds that of a second one, straight to the server, for scenarios that must
 * know what the session's backend is doing. Exit status: 0, or 3 where the driver itself could not go on. What the
 * libraries did is in the transcript only.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "transcript.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define WATCHDOG_SECONDS 60

PGconn *
connect_session(const char *conninfo)
{
	PGconn	   *session = PQconnectStart(conninfo);
	PostgresPollingStatusType wanted = PGRES_POLLING_WRITING;

	if (!session)
		die("PQconnectStart: out of memory");
	while (PQstatus(session) != CONNECTION_BAD && wanted != PGRES_POLLING_OK && wanted != PGRES_POLLING_FAILED)
	{
		struct pollfd fd = {.fd = PQsocket(session),.events = wanted == PGRES_POLLING_READING ? POLLIN : POLLOUT};

		if (poll(&fd, 1, -1) < 0 && errno != EINTR)
			die("poll: %m");
		wanted = PQconnectPoll(session);
	}
	return session;
}

PGconn *
connect_monitor(void)
{
	const char *conninfo = getenv("DRIVER_MONITOR");
	PGconn	   *monitor;

	if (!conninfo)
		die("this scenario needs DRIVER_MONITOR");
	monitor = PQconnectdb(conninfo);
	if (PQstatus(monitor) != CONNECTION_OK)
		die("monitor: %s", PQerrorMessage(monitor));
	return monitor;
}

void
wait_for_row(PGconn *monitor, const char *format, int pid)
{
	char		query[256];
	bool		found = false;

	snprintf(query, sizeof(query), format, pid);
	while (!found)
	{
		PGresult   *result = PQexec(monitor, query);

		if (PQresultStatus(result) != PGRES_TUPLES_OK)
			die("monitor: %s", PQerrorMessage(monitor));
		found = PQntuples(result) > 0;
		PQclear(result);
	}
}

int
main(int argc, char **argv)
{
	struct context context;
	struct sigaction action;

	if (argc < 3 || argc > 4)
		die("usage: driver CONNINFO SCENARIO [NUMBER]");
	/* Whatever hangs is killed by the signal; a write to a closed socket too, unless the library prevents SIGPIPE. */
	signal(SIGALRM, SIG_DFL);
	signal(SIGPIPE, SIG_DFL);
	alarm(WATCHDOG_SECONDS);
	context.conninfo = argv[1];
	context.number = argc > 3 ? atoi(argv[3]) : 0;
	context.session = connect_session(argv[1]);
	if (PQstatus(context.session) != CONNECTION_OK)
		die("session: %s", PQerrorMessage(context.session));
	say("session: ssl=%d", PQsslInUse(context.session));
	gate("session");
	run_scenario(argv[2], &context);
	if (context.session)
		PQfinish(context.session);
	if (sigaction(SIGPIPE, NULL, &action) < 0 || action.sa_handler != SIG_DFL)
		die("SIGPIPE is not as it was");
	return 0;
}
