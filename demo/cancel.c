/*
 * Cancel a running query from an event loop: never blocking, and encrypted whenever the session is.
 *
 *     cc -std=c11 -o cancel cancel.c -lpqcancel $(pkg-config --cflags --libs libpq)
 *     ./cancel 'host=db.example.com dbname=postgres sslmode=verify-full sslrootcert=ca.crt'
 */
#define _POSIX_C_SOURCE 200809L /* clock_gettime */

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include <libpq-fe.h>
#include <pqcancel.h>

static double milliseconds(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double) now.tv_sec * 1e3 + (double) now.tv_nsec / 1e6;
}

/* Waits for the query to end; Enter starts the cancel, driven by the same poll(). Returns NULL, or the error. */
static const char *event_loop(PGconn *session, PGcancelConn *cancel, double *began)
{
    enum { SESSION, ENTER, CANCEL };
    struct pollfd on[] = {{PQsocket(session), POLLIN, 0}, {STDIN_FILENO, POLLIN, 0}, {-1, 0, 0}};
    PostgresPollingStatusType want = PGRES_POLLING_OK;

    /* See a cancel through to its end: one that is still under way could hit the session's next query. */
    while (PQisBusy(session) || want != PGRES_POLLING_OK) {
        if (poll(on, 3, -1) < 0) {
            if (errno == EINTR)
                continue;
            return "poll() failed\n";
        }
        if (on[SESSION].revents && !PQconsumeInput(session))
            return PQerrorMessage(session);
        if (on[ENTER].revents) {
            on[ENTER].fd = -1;
            *began = milliseconds();
            want = PQcancelStart(cancel) ? PGRES_POLLING_WRITING : PGRES_POLLING_FAILED;
        } else if (on[CANCEL].revents) {
            want = PQcancelPoll(cancel);
        }
        if (want == PGRES_POLLING_FAILED)
            return PQcancelErrorMessage(cancel);
        on[CANCEL].fd = want == PGRES_POLLING_OK ? -1 : PQcancelSocket(cancel);
        on[CANCEL].events = want == PGRES_POLLING_READING ? POLLIN : POLLOUT;
    }
    return NULL;
}

int main(int argc, char **argv)
{
    PGconn *session = PQconnectdb(argc > 1 ? argv[1] : "");
    PGcancelConn *cancel = PQcancelCreate(session); /* holds the error, if there is one */
    const char *error = NULL;
    double began = 0;

    if (!PQsendQuery(session, "select pg_sleep(60)")) {
        error = PQerrorMessage(session);
    } else {
        puts("select pg_sleep(60) is running; press Enter to cancel it");
        error = event_loop(session, cancel, &began);
    }
    if (error) {
        fputs(error, stderr);
    } else {
        PGresult *result = PQgetResult(session);
        const char *sqlstate = PQresultErrorField(result, PG_DIAG_SQLSTATE);

        printf("%sSQLSTATE %s", PQresultErrorMessage(result), sqlstate ? sqlstate : "00000");
        if (began > 0)
            printf(", %.1f ms after the cancel began", milliseconds() - began);
        puts("");
        PQclear(result);
    }
    PQcancelFinish(cancel);
    PQfinish(session);
    return error ? 1 : 0;
}
