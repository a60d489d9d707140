/*
 * The same cancel with libpq's older function, PQcancel: it blocks, and it sends the session's
 * cancel key in plaintext although the session is encrypted. For the contrast with cancel.c.
 */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */

#include <stdio.h>
#include <time.h>

#include <libpq-fe.h>

static double milliseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double) now.tv_sec * 1e3 + (double) now.tv_nsec / 1e6;
}

int main(int argc, char **argv)
{
    PGconn *session = PQconnectdb(argc > 1 ? argv[1] : "");
    char failure[256] = "";
    int failed = 1;

    if (PQsendQuery(session, "select pg_sleep(60)")) {
        puts("select pg_sleep(60) is running; press Enter to cancel it");
        getchar();

        double began = milliseconds();
        PGcancel *cancel = PQgetCancel(session);

        if (PQcancel(cancel, failure, sizeof failure)) {
            PGresult *result = PQgetResult(session);
            const char *sqlstate = PQresultErrorField(result, PG_DIAG_SQLSTATE);

            printf("%sSQLSTATE %s, ", PQresultErrorMessage(result), sqlstate ? sqlstate : "00000");
            printf("%.1f ms after the cancel began\n", milliseconds() - began);
            PQclear(result);
            failed = 0;
        }
        PQfreeCancel(cancel);
    }
    if (failed)
        fprintf(stderr, "%s%s\n", PQerrorMessage(session), failure);
    PQfinish(session);
    return failed;
}
