/*
 * pqcancel.h: encrypted, non-blocking PostgreSQL query cancellation for any libpq.
 *
 * Include it after or instead of libpq-fe.h and link with -lpqcancel in front of -lpq. The
 * functions are those of libpq 17 and 18, chapter "Canceling Queries in Progress", and the older
 * ones, made safe: PQgetCancel(), PQcancel(), PQfreeCancel(), PQrequestCancel().
 *
 * Threads: different objects may be used by different threads at once; one object by one
 * thread at a time, as in libpq. Signals: only PQcancel() may be called from a signal handler.
 *
 * This file is generated from src/ffi.rs. Do not edit it; run `make header`.
 */

#ifndef PQCANCEL_H
#define PQCANCEL_H

#include <libpq-fe.h>

/* What libpq-fe.h of PostgreSQL 17 and later declares for this API, for older ones. */
#ifndef LIBPQ_HAS_ASYNC_CANCEL
#define LIBPQ_HAS_ASYNC_CANCEL 1

/* The 15th value of ConnStatusType: the cancel request is created but not started. */
#define CONNECTION_ALLOCATED ((ConnStatusType) 14)
#endif

/* An opaque cancel connection, from PQcancelCreate() to PQcancelFinish(). */
typedef struct pg_cancel_conn PGcancelConn;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Create a cancel connection for the session `conn`, as PQcancelCreate() of libpq 17 and 18.
 *
 * Everything needed is copied: `conn` may be used, closed or freed afterwards. Nothing is sent
 * yet. How the session is protected is decided now: a session over TLS is cancelled over TLS,
 * verified by the session's own settings, one encrypted with GSSAPI so, too, and never otherwise.
 * For one over TLS the first call reads the certificates that the session's options name, so that
 * PQcancelPoll() need not, unless they change; with all the roots that a machine trusts that takes
 * some milliseconds.
 *
 * Returns a cancel connection, to be freed with PQcancelFinish(); NULL only when out of memory.
 * If the session cannot be cancelled (NULL, closed, no key from the server, an unknown libpq),
 * its status is CONNECTION_BAD and PQcancelErrorMessage() tells why.
 *
 * Thread rule: no other thread may use `conn` during the call. Not for signal handlers.
 */
PGcancelConn *PQcancelCreate(PGconn *conn);

/**
 * Start to deliver the cancel request without waiting, as PQcancelStart() of libpq 17 and 18.
 *
 * Then wait until the socket of PQcancelSocket() can be written, and call PQcancelPoll().
 *
 * Returns 1 if it is started. Returns 0 if not (NULL, already bad, already started, or the
 * server cannot be reached): the status is then CONNECTION_BAD.
 *
 * Thread rule: one thread at a time. Not for signal handlers.
 */
int PQcancelStart(PGcancelConn *cancelConn);

/**
 * Deliver the cancel request and wait for the end, as PQcancelBlocking() of libpq 17 and 18.
 *
 * Waits as long as the session's connect_timeout allows (seconds; zero, negative and unset mean
 * without limit), with poll(2).
 *
 * Returns 1 if the server has taken the request; whether it had an effect, only the query's own
 * result tells. Returns 0 if not: PQcancelErrorMessage() tells why.
 *
 * Thread rule: one thread at a time. Not for signal handlers.
 */
int PQcancelBlocking(PGcancelConn *cancelConn);

/**
 * Go on with a started cancel request as far as that needs no waiting, as PQcancelPoll() of
 * libpq 17 and 18. Polling before the socket is ready does no harm. (With GSSAPI it waits if a ticket
 * has to be fetched from the KDC, as libpq does.)
 *
 * Returns PGRES_POLLING_READING or PGRES_POLLING_WRITING: wait until the socket of
 * PQcancelSocket() can be read or written, and call it again. Returns PGRES_POLLING_OK when the
 * server has taken the request. Returns PGRES_POLLING_FAILED when it failed, or for NULL (where
 * libpq crashes).
 *
 * Thread rule: one thread at a time. Not for signal handlers.
 */
PostgresPollingStatusType PQcancelPoll(PGcancelConn *cancelConn);

/**
 * The status of a cancel connection, as PQcancelStatus() of libpq 17 and 18.
 *
 * Returns CONNECTION_ALLOCATED before it is started, then CONNECTION_STARTED, CONNECTION_MADE,
 * CONNECTION_SSL_STARTUP, CONNECTION_GSS_STARTUP or CONNECTION_AWAITING_RESPONSE, in the end
 * CONNECTION_OK (the request is delivered) or CONNECTION_BAD (also for NULL).
 *
 * Thread rule: one thread at a time. Not for signal handlers.
 */
ConnStatusType PQcancelStatus(const PGcancelConn *cancelConn);

/**
 * The socket of a cancel connection, as PQcancelSocket() of libpq 17 and 18. It is non-blocking
 * and closed on exec; it belongs to the cancel connection and may change with each
 * PQcancelStart().
 *
 * Returns a descriptor, or -1 where there is none (also for NULL).
 *
 * Thread rule: one thread at a time. Not for signal handlers.
 */
int PQcancelSocket(const PGcancelConn *cancelConn);

/**
 * The message of the latest failure of a cancel connection, as PQcancelErrorMessage() of libpq
 * 17 and 18: in libpq's words, ending in a newline, empty after a success.
 *
 * Returns a string that belongs to the cancel connection and is valid until the next call with
 * it. For NULL it is a constant.
 *
 * Thread rule: one thread at a time. Not for signal handlers.
 */
char *PQcancelErrorMessage(const PGcancelConn *cancelConn);

/**
 * Close the connection of a cancel request, whatever became of it, and make it ready to be
 * started again, as PQcancelReset() of libpq 17 and 18. Its status is then CONNECTION_ALLOCATED.
 * NULL is ignored (where libpq crashes).
 *
 * Thread rule: one thread at a time. Not for signal handlers.
 */
void PQcancelReset(PGcancelConn *cancelConn);

/**
 * Close and free a cancel connection, at any point, as PQcancelFinish() of libpq 17 and 18. NULL
 * is ignored. If the request is not delivered yet, it may or may not be.
 *
 * Thread rule: one thread, and no use afterwards. Not for signal handlers.
 */
void PQcancelFinish(PGcancelConn *cancelConn);

/**
 * Make a PGcancel for the session `conn`, as PQgetCancel() of libpq: what PQcancel() needs, so that
 * it can be called from another thread or from a signal handler. To be freed with PQfreeCancel().
 *
 * How the session is protected is decided now, as by PQcancelCreate(). For an encrypted session the
 * first call in a process starts a thread, which has all signals blocked; for one in plaintext
 * nothing is started. Called again for the same session, it costs about a microsecond.
 *
 * Returns NULL if `conn` is NULL or closed, or when out of memory. Where else the session cannot be
 * cancelled (no key from the server, an unknown libpq), PQcancel() fails and tells why.
 *
 * Thread rule: no other thread may use `conn` during the call. Not for signal handlers.
 */
PGcancel *PQgetCancel(PGconn *conn);

/**
 * Cancel what the session is doing, as PQcancel() of libpq, and wait until the server has taken the
 * request.
 *
 * A session in plaintext is cancelled by system calls, for as long as they take, as in libpq. For
 * one that is encrypted the request is, too, exactly as by PQcancelBlocking(), by the thread that
 * PQgetCancel() started; it takes no longer than the session's connect_timeout, or if there is
 * none, PQCANCEL_TIMEOUT or 10 seconds. If that thread cannot go on, because the program was
 * interrupted while it held a lock (malloc's, say), PQcancel() fails after about half a second, or
 * two if the lock is one that spins.
 * What has failed is not sent any more, and nothing is ever sent in plaintext instead.
 *
 * Returns 1 if the request was sent, which does not mean that it had an effect. Returns 0 if not:
 * `errbuf`, a buffer of `errbufsize` bytes (256 are recommended), then holds the reason; it is
 * not changed otherwise. errno is kept.
 *
 * Thread rule: any thread, several at once. Signal rule: may be called from a signal handler.
 */
int PQcancel(PGcancel *cancel, char *errbuf, int errbufsize);

/**
 * Free a PGcancel, as PQfreeCancel() of libpq. NULL is ignored.
 *
 * Thread rule: one thread, and no use afterwards. Not for signal handlers.
 */
void PQfreeCancel(PGcancel *cancel);

/**
 * Cancel what the session is doing, as the deprecated PQrequestCancel() of libpq: PQgetCancel(),
 * PQcancel() and PQfreeCancel() in one.
 *
 * Returns 1 if the request was sent. Returns 0 if not: PQerrorMessage(conn) then tells why, cut off
 * at the size of that buffer.
 *
 * Thread rule: no other thread may use `conn` during the call. Not for signal handlers.
 */
int PQrequestCancel(PGconn *conn);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PQCANCEL_H */
