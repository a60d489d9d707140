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

#endif
