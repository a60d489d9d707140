/*
 * Makes a C program one that opens libpq by itself and looks every function up in that handle. Included by the command line
 * (-include) before all else, so that the programs of the other tests can be used as they are.
 */
#ifndef DROPIN_HANDLE_H
#define DROPIN_HANDLE_H

#define _GNU_SOURCE				/* as they say themselves, but here system headers come first */
#include <libpq-fe.h>
#include "pqcancel.h"

/*
 * What libpq.so.5, or what DROPIN_OPENS names, has of this name; dies if it has nothing. Another libpq, DROPIN_BESIDE, is
 * opened with it.
 */
void	   *in_handle(const char *name);

/* As dlclose. The next look-up opens it again. */
void		close_handle(void);

#define IN_HANDLE(name) (*(__typeof__(name) *) in_handle(#name))

#define PQbackendPID IN_HANDLE(PQbackendPID)
#define PQcancel IN_HANDLE(PQcancel)
#define PQcancelBlocking IN_HANDLE(PQcancelBlocking)
#define PQcancelCreate IN_HANDLE(PQcancelCreate)
#define PQcancelErrorMessage IN_HANDLE(PQcancelErrorMessage)
#define PQcancelFinish IN_HANDLE(PQcancelFinish)
#define PQcancelPoll IN_HANDLE(PQcancelPoll)
#define PQcancelReset IN_HANDLE(PQcancelReset)
#define PQcancelSocket IN_HANDLE(PQcancelSocket)
#define PQcancelStart IN_HANDLE(PQcancelStart)
#define PQcancelStatus IN_HANDLE(PQcancelStatus)
#define PQclear IN_HANDLE(PQclear)
#define PQconnectPoll IN_HANDLE(PQconnectPoll)
#define PQconnectStart IN_HANDLE(PQconnectStart)
#define PQconnectdb IN_HANDLE(PQconnectdb)
#define PQconsumeInput IN_HANDLE(PQconsumeInput)
#define PQerrorMessage IN_HANDLE(PQerrorMessage)
#define PQexec IN_HANDLE(PQexec)
#define PQfinish IN_HANDLE(PQfinish)
#define PQfreeCancel IN_HANDLE(PQfreeCancel)
#define PQgetCancel IN_HANDLE(PQgetCancel)
#define PQgetResult IN_HANDLE(PQgetResult)
#define PQgetvalue IN_HANDLE(PQgetvalue)
#define PQisBusy IN_HANDLE(PQisBusy)
#define PQlibVersion IN_HANDLE(PQlibVersion)
#define PQntuples IN_HANDLE(PQntuples)
#define PQrequestCancel IN_HANDLE(PQrequestCancel)
#define PQresultErrorField IN_HANDLE(PQresultErrorField)
#define PQresultStatus IN_HANDLE(PQresultStatus)
#define PQsendQuery IN_HANDLE(PQsendQuery)
#define PQsocket IN_HANDLE(PQsocket)
#define PQsslInUse IN_HANDLE(PQsslInUse)
#define PQstatus IN_HANDLE(PQstatus)

#endif
