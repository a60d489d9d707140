/*
 * ODBC: SQLCancel from another thread. The argument is a connection string.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include <sql.h>
#include <sqlext.h>

static void *
cancel_when_told(void *statement)
{
	getchar();
	printf("cancel: %d\n", SQLCancel(statement));
	return NULL;
}

static void
check(SQLSMALLINT kind, SQLHANDLE handle, SQLRETURN result)
{
	SQLCHAR		state[6],
				message[1024];

	if (SQL_SUCCEEDED(result))
		return;
	SQLGetDiagRec(kind, handle, 1, state, NULL, message, sizeof(message), NULL);
	printf("%s: %s\n", state, message);
	exit(1);
}

int
main(int argc, char **argv)
{
	SQLHENV		environment;
	SQLHDBC		session;
	SQLHSTMT	statement;
	SQLCHAR		sqlstate[6] = "00000";
	SQLINTEGER	answer;
	pthread_t	thread;

	if (argc != 2)
		return 2;
	SQLAllocHandle(SQL_HANDLE_ENV, SQL_NULL_HANDLE, &environment);
	SQLSetEnvAttr(environment, SQL_ATTR_ODBC_VERSION, (SQLPOINTER) SQL_OV_ODBC3, 0);
	SQLAllocHandle(SQL_HANDLE_DBC, environment, &session);
	check(SQL_HANDLE_DBC, session, SQLDriverConnect(session, NULL, (SQLCHAR *) argv[1], SQL_NTS, NULL, 0, NULL,
													SQL_DRIVER_NOPROMPT));
	check(SQL_HANDLE_DBC, session, SQLAllocHandle(SQL_HANDLE_STMT, session, &statement));

	pthread_create(&thread, NULL, cancel_when_told, statement);
	SQLExecDirect(statement, (SQLCHAR *) "select pg_sleep(600)", SQL_NTS);
	SQLGetDiagRec(SQL_HANDLE_STMT, statement, 1, sqlstate, NULL, NULL, 0, NULL);
	pthread_join(thread, NULL);
	printf("query: %s\n", sqlstate);

	SQLFreeStmt(statement, SQL_CLOSE);
	check(SQL_HANDLE_STMT, statement, SQLExecDirect(statement, (SQLCHAR *) "select 6 * 7", SQL_NTS));
	check(SQL_HANDLE_STMT, statement, SQLFetch(statement));
	SQLGetData(statement, 1, SQL_C_SLONG, &answer, 0, NULL);
	printf("answer: %d\n", (int) answer);

	SQLFreeHandle(SQL_HANDLE_STMT, statement);
	SQLDisconnect(session);
	SQLFreeHandle(SQL_HANDLE_DBC, session);
	SQLFreeHandle(SQL_HANDLE_ENV, environment);
	return 0;
}
