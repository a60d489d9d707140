/*
 * Every function that cancels, each with a query that runs.
 *
 * A table of scenarios for driver.c.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "transcript.h"

#include "query.h"
#include "session.h"

static int
by_blocking(PGconn *session)
{
	PGcancelConn *cancel = PQcancelCreate(session);
	int			result = PQcancelBlocking(cancel);

	if (!result)
		say("PQcancelBlocking: %s", PQcancelErrorMessage(cancel));
	PQcancelFinish(cancel);
	return result;
}

static int
by_polling(PGconn *session)
{
	PGcancelConn *cancel = PQcancelCreate(session);
	PostgresPollingStatusType wanted = PQcancelStart(cancel) ? PGRES_POLLING_WRITING : PGRES_POLLING_FAILED;

	while (wanted == PGRES_POLLING_READING || wanted == PGRES_POLLING_WRITING)
	{
		(void) wait_until_ready(PQcancelSocket(cancel), wanted);
		wanted = PQcancelPoll(cancel);
	}
	if (wanted != PGRES_POLLING_OK)
		say("PQcancelPoll: %s", PQcancelErrorMessage(cancel));
	PQcancelFinish(cancel);
	return wanted == PGRES_POLLING_OK;
}

static int
by_pqcancel(PGconn *session)
{
	char		error[256] = "";
	PGcancel   *cancel = PQgetCancel(session);
	int			result = PQcancel(cancel, error, sizeof(error));

	if (!result)
		say("PQcancel: %s", error);
	PQfreeCancel(cancel);
	return result;
}

static int
by_request(PGconn *session)
{
	int			result = PQrequestCancel(session);

	if (!result)
		say("PQrequestCancel: %s", PQerrorMessage(session));
	return result;
}

struct function
{
	const char *name;
	int			(*cancel) (PGconn *session);
};

static const struct function functions[] = {
	{"PQcancelBlocking", by_blocking},
	{"PQcancelPoll", by_polling},
	{"PQcancel", by_pqcancel},
	{"PQrequestCancel", by_request},
	{NULL, NULL}
};

static const struct function *const old_functions = functions + 2;

static void
cancel_queries(PGconn *session, const struct function *function)
{
	PGconn	   *monitor = connect_monitor();

	say("libpq: %d", PQlibVersion());
	for (; function->name; function++)
	{
		int			result;

		start_query(session, monitor);
		result = function->cancel(session);
		say("%s -> %d, query: %s", function->name, result, end_of_query(session));
	}
	PQfinish(monitor);
}

static void
run_cancelled(struct context *context)
{
	cancel_queries(context->session, functions);
}

static void
run_old(struct context *context)
{
	cancel_queries(context->session, old_functions);
}

/* The session does nothing: what the functions say is all there is. */
static void
run_idle(struct context *context)
{
	for (const struct function *function = functions; function->name; function++)
		say("%s -> %d", function->name, function->cancel(context->session));
}

const struct scenario scenarios[] = {
	{"cancelled", run_cancelled},
	{"old", run_old},
	{"idle", run_idle},
	{NULL, NULL}
};
