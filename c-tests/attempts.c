/*
 * Calls of PQcancel, from signal handlers above all, and everything that a caller sees of them: see attempts.h.
 *
 * attempt() is async-signal-safe itself: atomic counters, no lock, nothing formatted.
 */
#define _GNU_SOURCE
#include "attempts.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "handler_allocator.h"
#include "transcript.h"

#define ERRBUF_SIZE 256			/* libpq's documentation recommends it */
#define GUARD_SIZE 32			/* behind errbuf: nobody may write there */
#define FILLING 0x5a
#define ERRNO_BEFORE 4711
#define MESSAGES 16

_Thread_local PGcancel *volatile handler_cancel;

static void (*at_end_of_handler) (void);

static struct
{
	atomic_long calls;
	atomic_long delivered;
	atomic_long errno_changed;
	atomic_long errbuf_wrong;
	atomic_long longest;		/* microseconds */
}			counts;

enum message_state
{
	UNUSED, BEING_WRITTEN, WRITTEN
};

/* Each different text once, or twice where two threads came with it at the same time. */
static struct message
{
	atomic_int	state;
	atomic_long count;
	char		text[ERRBUF_SIZE];
}			messages[MESSAGES];

static long
microseconds(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000L + now.tv_nsec / 1000;
}

static void
count_message(const char *text)
{
	for (struct message *message = messages; message < messages + MESSAGES; message++)
	{
		int			found = UNUSED;

		if (atomic_compare_exchange_strong(&message->state, &found, BEING_WRITTEN))
		{
			memcpy(message->text, text, strlen(text) + 1);
			message->count = 1;
			message->state = WRITTEN;
			return;
		}
		if (found == WRITTEN && strcmp(message->text, text) == 0)
		{
			message->count++;
			return;
		}
	}
	abort();					/* so many different ones nobody foresaw */
}

/* A success leaves errbuf as it was; a failure puts a text of libpq's form into it. Neither writes behind it. */
static bool
errbuf_is_right(const char *errbuf, bool delivered)
{
	int			untouched_from = delivered ? 0 : ERRBUF_SIZE;

	for (int i = untouched_from; i < ERRBUF_SIZE + GUARD_SIZE; i++)
		if (errbuf[i] != FILLING)
			return false;
	return delivered || (memchr(errbuf, '\0', ERRBUF_SIZE) && strncmp(errbuf, "PQcancel() -- ", 14) == 0);
}

bool
attempt(PGcancel *cancel)
{
	char		errbuf[ERRBUF_SIZE + GUARD_SIZE];
	long		began = microseconds();
	long		lasted;
	long		longest = counts.longest;
	bool		delivered;

	memset(errbuf, FILLING, sizeof(errbuf));
	if (forbid_allocation)
		forbid_allocation(true);
	errno = ERRNO_BEFORE;
	delivered = PQcancel(cancel, errbuf, ERRBUF_SIZE) == 1;
	counts.errno_changed += errno != ERRNO_BEFORE;
	if (forbid_allocation)
		forbid_allocation(false);
	lasted = microseconds() - began;
	counts.calls++;
	counts.delivered += delivered;
	while (lasted > longest && !atomic_compare_exchange_weak(&counts.longest, &longest, lasted))
		;
	if (!errbuf_is_right(errbuf, delivered))
		counts.errbuf_wrong++;
	else if (!delivered)
		count_message(errbuf);
	return delivered;
}

static void
handler(int number)
{
	int			before = errno;

	(void) number;
	attempt(handler_cancel);
	if (at_end_of_handler)
		at_end_of_handler();
	errno = before;
}

void
attempt_on_signal(void (*at_end) (void))
{
	struct sigaction action = {.sa_handler = handler,.sa_flags = SA_RESTART};

	at_end_of_handler = at_end;
	if (sigaction(SIGUSR1, &action, NULL) < 0)
		die("sigaction: %m");
}

long
delivered_attempts(void)
{
	return counts.delivered;
}

void
say_attempts(void)
{
	/* Not say(): two processes may have the same to tell. */
	printf("attempts: %ld calls, %ld delivered, %ld with errno changed, %ld with errbuf wrong, longest %ld us\n", counts.calls,
		   counts.delivered, counts.errno_changed, counts.errbuf_wrong, counts.longest);
	for (int i = 0; i < MESSAGES && messages[i].state == WRITTEN; i++)
		printf("refused %ld times: %s%s", messages[i].count, messages[i].text, strchr(messages[i].text, '\n') ? "" : "\n");
	fflush(stdout);
	forget_attempts();
}

void
forget_attempts(void)
{
	memset(&counts, 0, sizeof(counts));
	memset(messages, 0, sizeof(messages));
}
