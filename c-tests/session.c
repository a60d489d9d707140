/*
 * Connections of the driver: the session that is to be cancelled, and a monitor that watches its backend.
 */
#define _GNU_SOURCE
#include "session.h"
#include "transcript.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

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
