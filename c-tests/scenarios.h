/*
 * The driver's scenarios, and what they need of its main program.
 */
#ifndef SCENARIOS_H
#define SCENARIOS_H

#include <libpq-fe.h>

struct context
{
	const char *conninfo;
	PGconn	   *session;		/* set to NULL by a scenario that has finished it */
	int			number;
};

/* Runs the scenario of that name; dies if there is none. */
void		run_scenario(const char *name, struct context *context);

/* Non-blocking, because libpq reads connect_timeout only in its blocking calls: a session may have a bad one. The session
 * may come out bad. */
PGconn	   *connect_session(const char *conninfo);

/* Connects as DRIVER_MONITOR says, or dies. */
PGconn	   *connect_monitor(void);

/* Asks the monitor until the query, formatted with the session's backend PID, returns a row. */
void		wait_for_row(PGconn *monitor, const char *format, int pid);

#endif
