/*
 * Connections of the driver: the session that is to be cancelled, and a monitor that watches its backend.
 */
#ifndef SESSION_H
#define SESSION_H

#include <libpq-fe.h>

/* Non-blocking, because libpq reads connect_timeout only in its blocking calls: a session may have a bad one. The session
 * may come out bad. */
PGconn	   *connect_session(const char *conninfo);

/* Connects as DRIVER_MONITOR says, or dies. */
PGconn	   *connect_monitor(void);

/* Asks the monitor until the query, formatted with the session's backend PID, returns a row. */
void		wait_for_row(PGconn *monitor, const char *format, int pid);

#endif
