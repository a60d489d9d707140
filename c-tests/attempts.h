/*
 * Calls of PQcancel, from signal handlers above all, and everything that a caller sees of them.
 */
#ifndef ATTEMPTS_H
#define ATTEMPTS_H

#include <stdbool.h>

#include <libpq-fe.h>

/* Calls PQcancel and counts what came of it: the result, errno, errbuf, the time. For handlers and for threads alike; under
 * handler_allocator.so the process is aborted if PQcancel allocates. */
bool		attempt(PGcancel *cancel);

/* What the handler cancels that interrupts this thread. */
extern _Thread_local PGcancel *volatile handler_cancel;

/* From now on SIGUSR1 makes an attempt, and calls this function at the end of the handler unless it is NULL. */
void		attempt_on_signal(void (*at_end) (void));

/* How many attempts returned 1 so far. */
long		delivered_attempts(void);

/* One line for all attempts of this process, and one for each message; then counts anew. */
void		say_attempts(void);

/* Counts anew: for a child, which has inherited its parent's counts. */
void		forget_attempts(void);

#endif
