/*
 * What cancels cost their client. The same object file is linked with libpq, and with pqcancel in front of it.
 *
 *     measure CONNINFO libraries           the files that the functions come from
 *     measure CONNINFO times WAY CANCELS   for each cancel: wall time, processor time. (WAY "bare": what its system calls alone
 *                                          take, over libpq 18, in plaintext)
 *     measure CONNINFO counts CANCELS      each way so many times, between marks that strace and callgrind see; prints for each
 *                                          the allocations, in a program linked with allocations.c
 *     measure CONNINFO steps CANCELS       from the first of the process on, polled. For each cancel: processor time of
 *                                          PQcancelCreate, of its dearest PQcancelPoll, and of all; wall time
 *     measure CONNINFO crowd CANCELS       all at once in one epoll loop: wall time, processor time, dearest PQcancelPoll,
 *                                          more resident memory at the peak, more allocated memory at the peak (or -1)
 *     measure CONNINFO pairs KIND PAIRS    PQcancelCreate and PQcancelFinish, or PQgetCancel and PQfreeCancel, ten times so
 *                                          many; for each tenth: wall time, processor time of one pair
 *
 * Times are in nanoseconds, one line for each. Processor time is that of all threads of the process; of single calls, that
 * of their thread. A real query is cancelled each way before anything is printed about it.
 */
#define _GNU_SOURCE
#include "allocations.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <libpq-fe.h>
#include <pqcancel.h>

#if __has_include(<valgrind/callgrind.h>)
#include <valgrind/callgrind.h>
#else
#define CALLGRIND_START_INSTRUMENTATION ((void) 0)
#define CALLGRIND_STOP_INSTRUMENTATION ((void) 0)
#define CALLGRIND_ZERO_STATS ((void) 0)
#define CALLGRIND_DUMP_STATS_AT(name) ((void) (name))
#endif

#define DEADLINE_SECONDS 300
#define QUERY_MS 20000
#define WARM_UPS 3
#define LOTS 10

static PGconn *session;

_Noreturn static void
die(const char *format,...)
{
	va_list		args;

	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	exit(3);
}

static long
now(clockid_t clock)
{
	struct timespec time;

	clock_gettime(clock, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

static PGcancelConn *
create(void)
{
	PGcancelConn *cancel = PQcancelCreate(session);

	if (PQcancelStatus(cancel) == CONNECTION_BAD)
		die("PQcancelCreate: %s", PQcancelErrorMessage(cancel));
	return cancel;
}

static void
start(PGcancelConn *cancel)
{
	if (!PQcancelStart(cancel))
		die("PQcancelStart: %s", PQcancelErrorMessage(cancel));
}

/* One PQcancelPoll, and the processor time of the dearest so far. */
static PostgresPollingStatusType
timed_poll(PGcancelConn *cancel, long *dearest)
{
	long		before = now(CLOCK_THREAD_CPUTIME_ID);
	PostgresPollingStatusType wanted = PQcancelPoll(cancel);
	long		took = now(CLOCK_THREAD_CPUTIME_ID) - before;

	if (took > *dearest)
		*dearest = took;
	return wanted;
}

/* dearest may be NULL: then no clock is asked. */
static void
poll_to_end(PGcancelConn *cancel, long *dearest)
{
	PostgresPollingStatusType wanted = PGRES_POLLING_WRITING;

	while (wanted != PGRES_POLLING_OK)
	{
		struct pollfd fd = {.fd = PQcancelSocket(cancel),.events = wanted == PGRES_POLLING_READING ? POLLIN : POLLOUT};

		if (poll(&fd, 1, -1) < 0 && errno != EINTR)
			die("poll: %m");
		wanted = dearest ? timed_poll(cancel, dearest) : PQcancelPoll(cancel);
		if (wanted == PGRES_POLLING_FAILED)
			die("PQcancelPoll: %s", PQcancelErrorMessage(cancel));
	}
}

static void
block(PGcancelConn *cancel)
{
	if (!PQcancelBlocking(cancel))
		die("PQcancelBlocking: %s", PQcancelErrorMessage(cancel));
}

/*
 * The ways to cancel
 */

static PGcancelConn *reset_each_time;
static PGcancel *kept;

static void
nothing(void)
{
}

static void
blocking(void)
{
	PGcancelConn *cancel = create();

	block(cancel);
	PQcancelFinish(cancel);
}

static void
polled(void)
{
	PGcancelConn *cancel = create();

	start(cancel);
	poll_to_end(cancel, NULL);
	PQcancelFinish(cancel);
}

static void
begin_reset(void)
{
	reset_each_time = create();
}

static void
reset(void)
{
	block(reset_each_time);
	PQcancelReset(reset_each_time);
}

static void
end_reset(void)
{
	PQcancelFinish(reset_each_time);
}

static void
begin_old(void)
{
	if (!(kept = PQgetCancel(session)))
		die("PQgetCancel: out of memory");
}

static void
old(void)
{
	char		error[256] = "";

	if (!PQcancel(kept, error, sizeof(error)))
		die("PQcancel: %s", error);
}

static void
end_old(void)
{
	PQfreeCancel(kept);
}

/*
 * The least that any client can do, over the very address: system calls, and nothing else. The request is where libpq 18 has
 * it in its struct pg_cancel.
 */
static void
bare(void)
{
	const unsigned char *packet = (const unsigned char *) kept + 160;
	size_t		size = (size_t) packet[2] << 8 | packet[3];
	struct sockaddr_storage address;
	socklen_t	length = sizeof(address);
	char		byte;
	int			fd;

	if (getpeername(PQsocket(session), (struct sockaddr *) &address, &length) < 0 ||
		(fd = socket(address.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0)) < 0 ||
		connect(fd, (struct sockaddr *) &address, length) < 0 ||
		send(fd, packet, size, MSG_NOSIGNAL) != (ssize_t) size ||
		recv(fd, &byte, 1, 0) != 0)
		die("bare system calls: %m");
	close(fd);
}

struct way
{
	const char *name;
	void		(*begin) (void);
	void		(*cancel) (void);
	void		(*end) (void);
};

static const struct way ways[] = {
	{"blocking", nothing, blocking, nothing},
	{"polled", nothing, polled, nothing},
	{"reset", begin_reset, reset, end_reset},
	{"PQcancel", begin_old, old, end_old},
};

#define WAYS (sizeof(ways) / sizeof(ways[0]))

/* For comparison; plaintext only. */
static const struct way bare_way = {"bare", begin_old, bare, end_old};

static const struct way *
way_named(const char *name)
{
	for (size_t i = 0; i < WAYS; i++)
		if (strcmp(ways[i].name, name) == 0)
			return &ways[i];
	if (strcmp(bare_way.name, name) == 0)
		return &bare_way;
	die("no such way: %s", name);
}

static bool
query_ends(int timeout)
{
	struct pollfd fd = {.fd = PQsocket(session),.events = POLLIN};

	if (poll(&fd, 1, timeout) > 0 && !PQconsumeInput(session))
		die("session: %s", PQerrorMessage(session));
	return !PQisBusy(session);
}

/* Cancels a real query: what is measured works. A cancel may come before the query; then the next one hits it. */
static void
prove(const struct way *way)
{
	PGresult   *result;
	const char *sqlstate;
	long		deadline = now(CLOCK_MONOTONIC) + QUERY_MS * 1000000L;

	if (!PQsendQuery(session, "select pg_sleep(1000)"))
		die("PQsendQuery: %s", PQerrorMessage(session));
	do
	{
		if (now(CLOCK_MONOTONIC) > deadline)
			die("%s cancels nothing", way->name);
		way->cancel();
	} while (!query_ends(100));
	result = PQgetResult(session);
	sqlstate = PQresultErrorField(result, PG_DIAG_SQLSTATE);
	if (!sqlstate || strcmp(sqlstate, "57014") != 0)
		die("the query was not cancelled by %s: %s", way->name, PQresultErrorMessage(result));
	PQclear(result);
	while ((result = PQgetResult(session)) != NULL)
		PQclear(result);
}

static void
warm_up(const struct way *way)
{
	way->begin();
	prove(way);
	for (int i = 0; i < WARM_UPS; i++)
		way->cancel();
}

/*
 * The measurements
 */

static const char *
file_of(void *function)
{
	Dl_info		info;

	return dladdr(function, &info) ? info.dli_fname : "?";
}

static void
libraries(void)
{
	printf("%s\n%s\n%d\n", file_of(dlsym(RTLD_DEFAULT, "PQcancelCreate")), file_of(dlsym(RTLD_DEFAULT, "PQconnectdb")),
		   PQlibVersion());
}

static void
times(const struct way *way, int cancels)
{
	warm_up(way);
	for (int i = 0; i < cancels; i++)
	{
		long		wall = now(CLOCK_MONOTONIC);
		long		processor = now(CLOCK_PROCESS_CPUTIME_ID);

		way->cancel();
		processor = now(CLOCK_PROCESS_CPUTIME_ID) - processor;
		wall = now(CLOCK_MONOTONIC) - wall;
		printf("%ld %ld\n", wall, processor);
	}
	way->end();
}

/* A system call that does nothing, for strace to see. */
static void
mark(const char *what, const struct way *way)
{
	char		text[64];
	int			length = snprintf(text, sizeof(text), "%s %s", what, way->name);

	if (write(-1, text, (size_t) length) >= 0)
		die("a mark was written");
}

static void
counts(int cancels)
{
	for (size_t i = 0; i < WAYS; i++)
	{
		const struct way *way = &ways[i];
		long		allocated = 0;

		warm_up(way);
		mark("begin", way);
		CALLGRIND_START_INSTRUMENTATION;
		CALLGRIND_ZERO_STATS;
		if (allocations_now)
			allocated = allocations_now().calls;
		for (int j = 0; j < cancels; j++)
			way->cancel();
		if (allocations_now)
			allocated = allocations_now().calls - allocated;
		CALLGRIND_DUMP_STATS_AT(way->name);
		CALLGRIND_STOP_INSTRUMENTATION;
		mark("end", way);
		if (allocations_now)
			printf("%s %ld\n", way->name, allocated);
		way->end();
	}
}

static void
steps(int cancels)
{
	for (int i = 0; i < cancels; i++)
	{
		long		wall = now(CLOCK_MONOTONIC);
		long		processor = now(CLOCK_PROCESS_CPUTIME_ID);
		long		creation = now(CLOCK_THREAD_CPUTIME_ID);
		long		dearest = 0;
		PGcancelConn *cancel = create();

		creation = now(CLOCK_THREAD_CPUTIME_ID) - creation;
		start(cancel);
		poll_to_end(cancel, &dearest);
		PQcancelFinish(cancel);
		processor = now(CLOCK_PROCESS_CPUTIME_ID) - processor;
		wall = now(CLOCK_MONOTONIC) - wall;
		printf("%ld %ld %ld %ld\n", creation, dearest, processor, wall);
	}
	prove(way_named("polled"));
}

/* Of /proc/self/status, in bytes. */
static long
status_of(const char *field)
{
	char		line[256];
	long		kibibytes = -1;
	FILE	   *status = fopen("/proc/self/status", "r");

	if (!status)
		die("/proc/self/status: %m");
	while (fgets(line, sizeof(line), status))
		if (strncmp(line, field, strlen(field)) == 0)
			kibibytes = strtol(line + strlen(field) + 1, NULL, 10);
	fclose(status);
	return kibibytes * 1024;
}

/* From now on VmHWM tells of what comes. */
static void
forget_peak(void)
{
	int			file = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);

	if (file < 0 || write(file, "5", 1) != 1)
		die("/proc/self/clear_refs: %m");
	close(file);
}

static void
allow_descriptors(int wanted)
{
	struct rlimit limit;

	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	if (limit.rlim_max < (rlim_t) wanted + 64 || setrlimit(RLIMIT_NOFILE, &limit) != 0)
		die("%d descriptors are needed, and %ld allowed", wanted + 64, (long) limit.rlim_max);
}

static void
watch(int epoll, int operation, PGcancelConn *cancel, PostgresPollingStatusType wanted)
{
	struct epoll_event event = {.events = wanted == PGRES_POLLING_READING ? EPOLLIN : EPOLLOUT,.data.ptr = cancel};

	if (epoll_ctl(epoll, operation, PQcancelSocket(cancel), &event) != 0)
		die("epoll_ctl: %m");
}

/* Drives cancels that have been started to their ends, and frees them. Returns the dearest PQcancelPoll. */
static long
drive(int epoll, int unfinished)
{
	struct epoll_event events[64];
	long		dearest = 0;

	while (unfinished > 0)
	{
		int			ready = epoll_wait(epoll, events, 64, -1);

		if (ready < 0 && errno != EINTR)
			die("epoll_wait: %m");
		for (int i = 0; i < ready; i++)
		{
			PGcancelConn *cancel = events[i].data.ptr;
			PostgresPollingStatusType wanted = timed_poll(cancel, &dearest);

			if (wanted == PGRES_POLLING_FAILED)
				die("PQcancelPoll: %s", PQcancelErrorMessage(cancel));
			if (wanted == PGRES_POLLING_OK)
			{
				PQcancelFinish(cancel);
				unfinished--;
			}
			else
				watch(epoll, EPOLL_CTL_MOD, cancel, wanted);
		}
	}
	return dearest;
}

static void
crowd(int cancels)
{
	int			epoll = epoll_create1(EPOLL_CLOEXEC);
	long		resident,
				wall,
				processor,
				dearest,
				allocated = 0;
	PGcancelConn **all = malloc((size_t) cancels * sizeof(*all));

	if (epoll < 0 || !all)
		die("no epoll: %m");
	allow_descriptors(cancels);
	warm_up(way_named("polled"));
	forget_peak();
	resident = status_of("VmRSS");
	if (allocations_now)
		allocated = allocations_now().live;
	wall = now(CLOCK_MONOTONIC);
	processor = now(CLOCK_PROCESS_CPUTIME_ID);
	for (int i = 0; i < cancels; i++)
		all[i] = create();
	for (int i = 0; i < cancels; i++)
	{
		start(all[i]);
		watch(epoll, EPOLL_CTL_ADD, all[i], PGRES_POLLING_WRITING);
	}
	dearest = drive(epoll, cancels);
	processor = now(CLOCK_PROCESS_CPUTIME_ID) - processor;
	wall = now(CLOCK_MONOTONIC) - wall;
	printf("%ld %ld %ld %ld %ld\n", wall, processor, dearest, status_of("VmHWM") - resident,
		   allocations_now ? allocations_now().peak - allocated : -1);
	free(all);
	close(epoll);
}

static void
pairs(bool new_functions, int number)
{
	warm_up(way_named(new_functions ? "blocking" : "PQcancel"));
	for (int lot = 0; lot < LOTS; lot++)
	{
		long		wall = now(CLOCK_MONOTONIC);
		long		processor = now(CLOCK_PROCESS_CPUTIME_ID);

		for (int i = 0; i < number; i++)
		{
			if (new_functions)
				PQcancelFinish(create());
			else
				PQfreeCancel(PQgetCancel(session));
		}
		processor = now(CLOCK_PROCESS_CPUTIME_ID) - processor;
		wall = now(CLOCK_MONOTONIC) - wall;
		printf("%.1f %.1f\n", (double) wall / number, (double) processor / number);
	}
}

int
main(int argc, char **argv)
{
	const char *what = argc > 2 ? argv[2] : "";
	int			number = atoi(argv[argc - 1]);

	alarm(DEADLINE_SECONDS);
	if (argc < 3)
		die("usage: see measure.c");
	session = PQconnectdb(argv[1]);
	if (PQstatus(session) != CONNECTION_OK)
		die("session: %s", PQerrorMessage(session));
	if (strcmp(what, "libraries") == 0)
		libraries();
	else if (number <= 0)
		die("how many?");
	else if (strcmp(what, "times") == 0 && argc == 5)
		times(way_named(argv[3]), number);
	else if (strcmp(what, "counts") == 0)
		counts(number);
	else if (strcmp(what, "steps") == 0)
		steps(number);
	else if (strcmp(what, "crowd") == 0)
		crowd(number);
	else if (strcmp(what, "pairs") == 0 && argc == 5)
		pairs(strcmp(argv[3], "new") == 0, number);
	else
		die("usage: see measure.c");
	PQfinish(session);
	return 0;
}
