/*
 * The drop-in: a libpq.so.5 that hands everything on, to the real libpq or to libpqcancel.
 *
 * It is for programs that load libpq by themselves and look its functions up in that handle (dlopen and dlsym; Python's
 * ctypes). No preloaded library comes between; but in a directory of LD_LIBRARY_PATH this one is loaded in libpq's place.
 * It needs libpqcancel.so.1 and libpq-host.so.5, which is a link to the real libpq, and the loader looks every name up here
 * first, then in the one, then in the other. So all functions of all libpqs are there without a list of them, and each
 * name means one function.
 *
 * Only those that take a PGconn are here themselves. Which libpq made the PGconn, libpqcancel is told by who calls it: it
 * is the one that the caller depends on. A call of what dlsym() returned may come from anywhere (libffi, which belongs to
 * no libpq). From here it comes from an object that depends on the right libpq. The other functions of libpqcancel take
 * what these have made, which knows its libpq.
 *
 * build.sh makes it, and adds the names of the real libpq's symbol versions, if it has any.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>

#include "pqcancel.h"

#define EXPORTED __attribute__((visibility("default")))

/*
 * To be done with a result before it is returned. CAUTION: without it the call before may be made a jump, after which
 * libpqcancel would return to our caller, and take that one for its own.
 */
#define HOLD(result) __asm__ volatile("" : "+r" (result))

/*
 * libpqcancel's function of a name; by its handle, because in any other place the loader would find ours, or libpq's. It
 * is there for good, because libpqcancel is never unloaded.
 */
static void *
libpqcancels(const char *name, _Atomic(void *) *found)
{
	void	   *function = atomic_load(found);
	void	   *library;

	if (!function && (library = dlopen("libpqcancel.so.1", RTLD_LAZY | RTLD_NOLOAD)) != NULL)
	{
		function = dlsym(library, name);
		atomic_store(found, function);
		dlclose(library);
	}
	return function;
}

EXPORTED PGcancel *
PQgetCancel(PGconn *conn)
{
	static _Atomic(void *) found;
	PGcancel   *(*function) (PGconn *) = (PGcancel * (*) (PGconn *)) libpqcancels("PQgetCancel", &found);
	PGcancel   *cancel = function ? function(conn) : NULL;

	HOLD(cancel);
	return cancel;
}

EXPORTED int
PQrequestCancel(PGconn *conn)
{
	static _Atomic(void *) found;
	int			(*function) (PGconn *) = (int (*) (PGconn *)) libpqcancels("PQrequestCancel", &found);
	int			delivered = function ? function(conn) : 0;

	HOLD(delivered);
	return delivered;
}

EXPORTED PGcancelConn *
PQcancelCreate(PGconn *conn)
{
	static _Atomic(void *) found;
	PGcancelConn *(*function) (PGconn *) = (PGcancelConn * (*) (PGconn *)) libpqcancels("PQcancelCreate", &found);
	PGcancelConn *cancel = function ? function(conn) : NULL;

	HOLD(cancel);
	return cancel;
}
