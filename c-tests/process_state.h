/*
 * What a process has of its own and a guest must leave alone, as text that can be compared.
 */
#ifndef PROCESS_STATE_H
#define PROCESS_STATE_H

#include <stddef.h>
#include <sys/resource.h>

#define STATE_SIZE 65536

/* Every open descriptor and what it is open on. */
void		list_descriptors(char *to, size_t size);

/* The memory that is really there, in kB. */
long		resident_kilobytes(void);

/* Lowers the limit so that this many more descriptors can be opened; says what it was before. */
void		leave_room(int descriptors, struct rlimit *before);

/* Gives the process a signal mask, handlers, a umask and so on that no library would choose. */
void		make_state_unusual(void);

/* Signal mask and actions, environment, working directory, umask, limits, timers, locale, rounding, threads, descriptors. */
void		describe_state(char *to, size_t size);

/* Says the first lines that differ. */
void		say_difference(const char *before, const char *after);

#endif
