/*
 * A program linked with the library: PQcancelBlocking.
 */
#include <stdio.h>

#include <libpq-fe.h>
#include <pqcancel.h>

int
main(int argc, char **argv)
{
	PGconn	   *session = PQconnectdb(argc > 1 ? argv[1] : "");
	PGcancelConn *cancel = PQcancelCreate(session);
	PGresult   *result;

	PQsendQuery(session, "select pg_sleep(600)");
	getchar();
	if (!PQcancelBlocking(cancel))
		fputs(PQcancelErrorMessage(cancel), stdout);
	PQcancelFinish(cancel);

	result = PQgetResult(session);
	printf("query: %s\n", PQresultErrorField(result, PG_DIAG_SQLSTATE));
	PQclear(result);
	PQclear(PQgetResult(session));

	result = PQexec(session, "select 6 * 7");
	printf("answer: %s\n", PQgetvalue(result, 0, 0));
	PQclear(result);
	PQfinish(session);
	return 0;
}
