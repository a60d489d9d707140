/*
 * What a process has of its own: see process_state.h.
 */
#define _GNU_SOURCE
#include "process_state.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fenv.h>
#include <locale.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include "transcript.h"

extern char **environ;

struct text
{
	char	   *to;
	size_t		left;
};

static void
append(struct text *text, const char *format,...)
{
	va_list		args;
	int			length;

	va_start(args, format);
	length = vsnprintf(text->to, text->left, format, args);
	va_end(args);
	if (length < 0 || (size_t) length >= text->left)
		die("the state needs more room");
	text->to += length;
	text->left -= (size_t) length;
}

static void
append_directory(struct text *text, const char *name, bool links)
{
	DIR		   *directory = opendir(name);
	struct dirent *entry;

	if (!directory)
		die("%s: %m", name);
	while ((entry = readdir(directory)) != NULL)
	{
		char		target[512] = "";

		if (entry->d_name[0] == '.' || (links && atoi(entry->d_name) == dirfd(directory)))
			continue;
		if (links && readlinkat(dirfd(directory), entry->d_name, target, sizeof(target) - 1) < 0)
			die("readlinkat: %m");
		append(text, "%s %s -> %s\n", name, entry->d_name, target);
	}
	closedir(directory);
}

void
list_descriptors(char *to, size_t size)
{
	struct text text = {to, size};

	append_directory(&text, "/proc/self/fd", true);
}

static void
handler(int number, siginfo_t *info, void *ucontext)
{
	(void) number;
	(void) info;
	(void) ucontext;
}

void
make_state_unusual(void)
{
	struct sigaction action = {.sa_sigaction = handler,.sa_flags = SA_SIGINFO | SA_NODEFER};
	sigset_t	blocked;

	sigaddset(&action.sa_mask, SIGWINCH);
	if (sigaction(SIGUSR1, &action, NULL) < 0 || sigaction(SIGPIPE, &action, NULL) < 0 || sigaction(SIGINT, &action, NULL) < 0)
		die("sigaction: %m");
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGUSR2);
	sigaddset(&blocked, SIGTERM);
	if (sigprocmask(SIG_BLOCK, &blocked, NULL) < 0)
		die("sigprocmask: %m");
	raise(SIGUSR2);				/* and stays pending */
	umask(0135);
	if (chdir("/usr") < 0)
		die("chdir: %m");
	setenv("SSL_CERT_FILE", "/nonexistent", 1);
	setenv("OPENSSL_CONF", "/nonexistent", 1);
	setlocale(LC_ALL, "C.UTF-8");
	fesetround(FE_UPWARD);
}

static void
append_signals(struct text *text)
{
	sigset_t	mask;
	sigset_t	pending;

	if (sigprocmask(SIG_SETMASK, NULL, &mask) < 0 || sigpending(&pending) < 0)
		die("sigprocmask: %m");
	for (int number = 1; number <= SIGRTMAX; number++)
	{
		struct sigaction action;

		if (sigaction(number, NULL, &action) < 0)
			continue;			/* the C library's own */
		append(text, "signal %d: handler %p, flags %x, blocked %d, pending %d, masks", number,
			   (void *) (size_t) action.sa_sigaction, (unsigned) action.sa_flags, sigismember(&mask, number),
			   sigismember(&pending, number));
		for (int other = 1; other <= SIGRTMAX; other++)
			if (sigismember(&action.sa_mask, other) == 1)
				append(text, " %d", other);
		append(text, "\n");
	}
}

static void
append_limits(struct text *text)
{
	for (int resource = 0; resource < (int) RLIM_NLIMITS; resource++)
	{
		struct rlimit limit;

		if (getrlimit(resource, &limit) < 0)
			die("getrlimit: %m");
		append(text, "limit %d: %lx %lx\n", resource, (unsigned long) limit.rlim_cur, (unsigned long) limit.rlim_max);
	}
	for (int which = ITIMER_VIRTUAL; which <= ITIMER_PROF; which++)
	{
		struct itimerval timer;

		if (getitimer(which, &timer) < 0)
			die("getitimer: %m");
		append(text, "timer %d: %ld %ld\n", which, (long) timer.it_value.tv_sec, (long) timer.it_value.tv_usec);
	}
	append(text, "alarm: %s\n", alarm(120) > 0 ? "runs" : "off");
}

void
describe_state(char *to, size_t size)
{
	struct text text = {to, size};
	char		directory[4096];
	mode_t		mask = umask(0);

	umask(mask);
	append_signals(&text);
	append(&text, "environment at %p\n", (void *) environ);
	for (char **variable = environ; *variable; variable++)
		append(&text, "environment: %s\n", *variable);
	if (!getcwd(directory, sizeof(directory)))
		die("getcwd: %m");
	append(&text, "directory: %s, umask: %o\n", directory, (unsigned) mask);
	append_limits(&text);
	append(&text, "locale: %s, rounding: %d\n", setlocale(LC_ALL, NULL), fegetround());
	for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
		append(&text, "descriptor %d: flags %x\n", fd, (unsigned) fcntl(fd, F_GETFL));
	append_directory(&text, "/proc/self/task", false);
	append_directory(&text, "/proc/self/fd", true);
}

void
say_difference(const char *before, const char *after)
{
	while (*before && *after)
	{
		int			one = (int) strcspn(before, "\n");
		int			two = (int) strcspn(after, "\n");

		if (one != two || strncmp(before, after, (size_t) one) != 0)
		{
			say("before: %.*s", one, before);
			say("after: %.*s", two, after);
			return;
		}
		before += one + (before[one] == '\n');
		after += two + (after[two] == '\n');
	}
	if (*before || *after)
		say("before also: %.200s\nafter also: %.200s", before, after);
}

/* Without the pages of files, which come and go. (statm would do, were it exact on machines with many processors.) */
long
resident_kilobytes(void)
{
	FILE	   *file = fopen("/proc/self/smaps_rollup", "r");
	char		line[128];
	long		sum = 0;

	if (!file)
		die("/proc/self/smaps_rollup: %m");
	while (fgets(line, sizeof(line), file))
	{
		long		size;

		if (sscanf(line, "Anonymous: %ld", &size) == 1 || sscanf(line, "Swap: %ld", &size) == 1)
			sum += size;
	}
	fclose(file);
	return sum;
}

void
leave_room(int descriptors, struct rlimit *before)
{
	struct rlimit limit;
	int			next = dup(STDIN_FILENO);

	if (next < 0 || getrlimit(RLIMIT_NOFILE, before) < 0)
		die("getrlimit: %m");
	close(next);
	limit = *before;
	limit.rlim_cur = (rlim_t) (next + descriptors);
	if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
		die("setrlimit: %m");
}
