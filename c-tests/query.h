/*
 * A query that runs until it is cancelled.
 */
#ifndef QUERY_H
#define QUERY_H

#include <stdbool.h>

#include <libpq-fe.h>

/* Begins one, and returns when the server is at it. */
void		start_query(PGconn *session, PGconn *monitor);

/* Is the server still at it? */
bool		query_runs(PGconn *session, PGconn *monitor);

/* Waits for its end and returns its SQLSTATE; dies unless the session answers the next query. */
const char *end_of_query(PGconn *session);

#endif
