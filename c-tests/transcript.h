/*
 * What the driver prints, and how it waits: one line per libpq call, written so that two runs over two libraries can be
 * compared byte by byte. Nothing here depends on timing, process IDs or descriptor numbers.
 */
#ifndef TRANSCRIPT_H
#define TRANSCRIPT_H

#include <stdbool.h>

#include <libpq-fe.h>
#include "pqcancel.h"

/* Reports an error of the driver itself (never of what is under test) with its line, and ends the process with 3. */
#define die(...) die_impl(__FILE__, __LINE__, __VA_ARGS__)
_Noreturn void die_impl(const char *file, int line, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

/* Prints a line of the transcript, unless it is the same as the one before: how often PQcancelPoll must be called
 * depends on timing, and so does nothing else. */
void		say(const char *format,...) __attribute__((format(printf, 1, 2)));

/* Prints a call, what it returned, and all that the PGcancelConn shows afterwards. */
void		say_call(const char *function, const char *result, PGcancelConn *cancel);

/* The tester's calls: made, reported, and their value returned. */
PGcancelConn *create(PGconn *session);
int			start(PGcancelConn *cancel);
int			blocking(PGcancelConn *cancel);
PostgresPollingStatusType poll_once(PGcancelConn *cancel);
void		reset(PGcancelConn *cancel);
void		finish(PGcancelConn *cancel);

/* Waits until the socket is ready for what PQcancelPoll (or PQconnectPoll) asked for. False: the test's server told over
 * the control socket that it will not do anything any more, and nothing is ready. */
bool		wait_until_ready(int sock, PostgresPollingStatusType wanted);

/* Polls, each time when the socket is ready, until the end; returns the last answer. */
PostgresPollingStatusType poll_to_end(PGcancelConn *cancel);

/* Stops, where the test asked for it (DRIVER_GATES, names separated by commas), until the test lets us go on. */
void		gate(const char *name);

/* Number of open descriptors of this process. */
int			open_descriptors(void);

#endif
