/*
 * A query that runs until it is cancelled: see query.h.
 */
#define _GNU_SOURCE
#include "query.h"

#include <poll.h>
#include <stdio.h>
#include <string.h>

#include "session.h"
#include "transcript.h"

#define DEADLINE_MS 100000
#define AT_IT "select from pg_stat_activity where pid = %d and wait_event = 'PgSleep'"

void
start_query(PGconn *session, PGconn *monitor)
{
	if (!PQsendQuery(session, "select pg_sleep(1000)"))
		die("PQsendQuery: %s", PQerrorMessage(session));
	wait_for_row(monitor, AT_IT, PQbackendPID(session));
}

bool
query_runs(PGconn *session, PGconn *monitor)
{
	char		query[256];
	PGresult   *result;
	bool		runs;

	snprintf(query, sizeof(query), AT_IT, PQbackendPID(session));
	result = PQexec(monitor, query);
	if (PQresultStatus(result) != PGRES_TUPLES_OK)
		die("monitor: %s", PQerrorMessage(monitor));
	runs = PQntuples(result) == 1;
	PQclear(result);
	return runs;
}

/* So that PQgetResult does not wait for a cancel that never came. */
static void
wait_for_result(PGconn *session)
{
	struct pollfd fd = {.fd = PQsocket(session),.events = POLLIN};

	while (PQisBusy(session))
	{
		int			ready = poll(&fd, 1, DEADLINE_MS);

		if (ready == 0)
			die("the query has not ended for %d ms", DEADLINE_MS);
		if (ready > 0 && !PQconsumeInput(session))
			die("session: %s", PQerrorMessage(session));
	}
}

const char *
end_of_query(PGconn *session)
{
	static char sqlstate[6];
	PGresult   *result;

	wait_for_result(session);
	strcpy(sqlstate, "00000");
	while ((result = PQgetResult(session)) != NULL)
	{
		const char *found = PQresultErrorField(result, PG_DIAG_SQLSTATE);

		if (found)
			snprintf(sqlstate, sizeof(sqlstate), "%s", found);
		PQclear(result);
	}
	result = PQexec(session, "select 42");
	if (PQntuples(result) != 1 || strcmp(PQgetvalue(result, 0, 0), "42") != 0)
		die("the session is no good any more: %s", PQerrorMessage(session));
	PQclear(result);
	return sqlstate;
}
