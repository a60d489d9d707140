/*
 * A plugin of some host program: linked with a libpq of its own, loaded privately, and unloaded as a whole.
 * several_libpqs.py loads it.
 */
#include <stdio.h>

#include <libpq-fe.h>
#include "pqcancel.h"

int			plugin_cancel(PGconn *session, char *errbuf, int errbufsize);
int			plugin_cancel_safe(PGconn *session, char *errbuf, int errbufsize);

int
plugin_cancel(PGconn *session, char *errbuf, int errbufsize)
{
	PGcancel   *cancel = PQgetCancel(session);
	int			delivered = PQcancel(cancel, errbuf, errbufsize);

	PQfreeCancel(cancel);
	return delivered;
}

int
plugin_cancel_safe(PGconn *session, char *errbuf, int errbufsize)
{
	PGcancelConn *cancel = PQcancelCreate(session);
	int			delivered = PQcancelBlocking(cancel);

	snprintf(errbuf, (size_t) errbufsize, "%s", PQcancelErrorMessage(cancel));
	PQcancelFinish(cancel);
	return delivered;
}
