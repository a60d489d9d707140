/*
 * The program that is run over libpq 18 and over pqcancel, and must print the same over both.
 *
 *     driver CONNINFO SCENARIO [NUMBER]
 *
 * CONNINFO is the session's; DRIVER_MONITOR holds that of a second one, straight to the server, for scenarios that must
 * know what the session's backend is doing. Exit status: 0, or 3 where the driver itself could not go on. What the
 * libraries did is in the transcript only.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "session.h"
#include "transcript.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WATCHDOG_SECONDS 600

__attribute__((weak)) void
before_session(const char *scenario)
{
	(void) scenario;
}

int
main(int argc, char **argv)
{
	const struct scenario *scenario = scenarios;
	struct context context;
	struct sigaction action;

	if (argc < 3 || argc > 4)
		die("usage: driver CONNINFO SCENARIO [NUMBER]");
	while (scenario->name && strcmp(scenario->name, argv[2]) != 0)
		scenario++;
	if (!scenario->name)
		die("no scenario %s", argv[2]);
	/* Whatever hangs is killed by the signal; a write to a closed socket too, unless the library prevents SIGPIPE. */
	signal(SIGALRM, SIG_DFL);
	signal(SIGPIPE, SIG_DFL);
	alarm(WATCHDOG_SECONDS);
	before_session(argv[2]);
	context.conninfo = argv[1];
	context.number = argc > 3 ? atoi(argv[3]) : 0;
	context.session = connect_session(argv[1]);
	if (PQstatus(context.session) != CONNECTION_OK)
		die("session: %s", PQerrorMessage(context.session));
	say("session: ssl=%d", PQsslInUse(context.session));
	gate("session");
	scenario->run(&context);
	if (context.session)
		PQfinish(context.session);
	if (sigaction(SIGPIPE, NULL, &action) < 0 || action.sa_handler != SIG_DFL)
		die("SIGPIPE is not as it was");
	return 0;
}
