/*
 * What may happen to a libpq that a program opens by itself: it is closed and opened again, and others need it too.
 *
 * A table of scenarios for driver.c, compiled with dropin_handle.h.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "transcript.h"

#include <dlfcn.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>

#include "query.h"
#include "session.h"

typedef int (*plugin_function) (PGconn *session, char *errbuf, int errbufsize);

static int
say_libpq(struct dl_phdr_info *info, size_t size, void *data)
{
	const char *slash = strrchr(info->dlpi_name, '/');
	const char *name = slash ? slash + 1 : info->dlpi_name;

	(void) size;
	(void) data;
	if (strncmp(name, "libpq.", strlen("libpq.")) == 0 || strncmp(name, "libpq-", strlen("libpq-")) == 0)
		say("loaded: %s", name);
	return 0;
}

static void
cancel_by(const char *who, plugin_function function, PGconn *session)
{
	PGconn	   *monitor = connect_monitor();
	char		errbuf[256] = "";
	int			delivered;

	start_query(session, monitor);
	delivered = function(session, errbuf, sizeof(errbuf));
	say("cancelled by %s -> %d \"%s\", query: %s", who, delivered, errbuf, end_of_query(session));
	PQfinish(monitor);
}

static int
cancel_myself(PGconn *session, char *errbuf, int errbufsize)
{
	PGcancel   *cancel = PQgetCancel(session);
	int			delivered = PQcancel(cancel, errbuf, errbufsize);

	PQfreeCancel(cancel);
	return delivered;
}

/* plugin.c, which is linked with libpq. */
static plugin_function
plugin_cancel(void)
{
	void	   *plugin = dlopen(getenv("DRIVER_PLUGIN"), RTLD_NOW);
	void	   *function = plugin ? dlsym(plugin, "plugin_cancel") : NULL;

	if (!function)
		die("%s", dlerror());
	return (plugin_function) function;
}

void
before_session(const char *scenario)
{
	if (strcmp(scenario, "plugin-first") == 0)
		plugin_cancel();
}

/* The session is the handle's: the plugin could not do anything with it if it had another libpq. */
static void
run_plugin(struct context *context)
{
	plugin_function by_plugin = plugin_cancel();

	cancel_by("the plugin", by_plugin, context->session);
	cancel_by("the program", cancel_myself, context->session);
	dl_iterate_phdr(say_libpq, NULL);
}

/* With a number, it cancels something before it closes the libpq. */
static void
run_reopened(struct context *context)
{
	if (context->number)
		cancel_by("the program", cancel_myself, context->session);
	PQfinish(context->session);
	close_handle();
	say("closed");
	dl_iterate_phdr(say_libpq, NULL);
	context->session = connect_session(context->conninfo);
	say("opened again");
	dl_iterate_phdr(say_libpq, NULL);
	cancel_by("the program, again", cancel_myself, context->session);
}

const struct scenario scenarios[] = {
	{"plugin", run_plugin},
	{"plugin-first", run_plugin},
	{"reopened", run_reopened},
	{NULL, NULL}
};
