/*
 * A program written for libpq 17, in C11 and C++11: it cancels a query by the new functions if LIBPQ_HAS_ASYNC_CANCEL tells
 * that they are there, and by the old ones otherwise. It knows nothing of pqcancel, and is not to be changed for it.
 *
 *     async_cancel CONNINFO
 *
 * The query runs until a line comes on stdin.
 */
#define _GNU_SOURCE 1			/* ppoll */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>

#include <libpq-fe.h>

static void
fail(const char *what, const char *message)
{
	fprintf(stderr, "%s: %s", what, message);
	exit(1);
}

#ifdef LIBPQ_HAS_ASYNC_CANCEL

static void
cancel_query(PGconn *conn)
{
	PGcancelConn *cancel = PQcancelCreate(conn);
	PostgresPollingStatusType polling = PGRES_POLLING_WRITING;

	if (PQcancelStatus(cancel) != CONNECTION_ALLOCATED || !PQcancelStart(cancel))
		fail("PQcancelStart", PQcancelErrorMessage(cancel));
	while (polling != PGRES_POLLING_OK && polling != PGRES_POLLING_FAILED)
	{
		struct pollfd on = {PQcancelSocket(cancel), (short) (polling == PGRES_POLLING_READING ? POLLIN : POLLOUT), 0};

		(void) ppoll(&on, 1, NULL, NULL);
		polling = PQcancelPoll(cancel);
	}
	if (polling != PGRES_POLLING_OK || PQcancelStatus(cancel) != CONNECTION_OK)
		fail("PQcancelPoll", PQcancelErrorMessage(cancel));
	PQcancelFinish(cancel);
	puts("cancelled by the new functions");
}

#else

static void
cancel_query(PGconn *conn)
{
	char		error[256];
	PGcancel   *cancel = PQgetCancel(conn);

	if (!PQcancel(cancel, error, sizeof(error)))
		fail("PQcancel", error);
	PQfreeCancel(cancel);
	puts("cancelled by the old functions");
}

#endif

int
main(int argc, char **argv)
{
	PGconn	   *conn = PQconnectdb(argc > 1 ? argv[1] : "");
	PGresult   *result;

	if (!PQsendQuery(conn, "select pg_sleep(1000)"))
		fail("PQsendQuery", PQerrorMessage(conn));
	(void) getchar();
	cancel_query(conn);
	while ((result = PQgetResult(conn)) != NULL)
	{
		printf("SQLSTATE %s\n", PQresultErrorField(result, PG_DIAG_SQLSTATE));
		PQclear(result);
	}
	PQfinish(conn);
	return 0;
}
