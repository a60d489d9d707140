/*
 * What a program of scenarios consists of.
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

struct scenario
{
	const char *name;
	void		(*run) (struct context *context);
};

/* A program is driver.c's main() and one table: scenarios.c's or guest.c's. The last entry has no name. */
extern const struct scenario scenarios[];

/* Called before the session is made, for what the session needs, too. A program may do without. */
void		before_session(const char *scenario);

#endif
