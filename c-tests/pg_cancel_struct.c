/*
 * Programs that know what is inside a PGcancel, and PGcancels that cross between libpq's own functions and those in front of
 * it; each with a query that runs.
 */
#define _GNU_SOURCE
#include "scenarios.h"
#include "query.h"
#include "session.h"
#include "transcript.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <stddef.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define CANCEL_REQUEST_CODE 80877102
#define ERRBUF_SIZE 256

/* As ruby-pg declares it, and userver: libpq's own up to 17, or the beginning of that. */
struct pg_cancel_17
{
	struct
	{
		struct sockaddr_storage addr;
		socklen_t	salen;
	}			raddr;
	int			be_pid;
	int			be_key;
};

/* libpq 18. The packet is in network byte order. */
struct pg_cancel_18
{
	char		address_and_options[160];
	uint32_t	length;			/* of the packet, with this field */
	uint32_t	code;
	uint32_t	pid;
	char		key[256];
};

_Static_assert(offsetof(struct pg_cancel_17, be_pid) == 136, "be_pid");
_Static_assert(offsetof(struct pg_cancel_17, be_key) == 140, "be_key");
_Static_assert(offsetof(struct pg_cancel_18, key) == 172, "key");

/* libpq's own functions, past whatever stands in front of them: dlsym() with a handle looks into that object first. */
static struct
{
	PGcancel   *(*get) (PGconn *);
	int			(*cancel) (PGcancel *, char *, int);
	void		(*free) (PGcancel *);
}			host;

static void *
function_of(void *libpq, const char *name)
{
	void	   *function = dlsym(libpq, name);

	if (!function)
		die("%s", dlerror());
	return function;
}

static void
find_host(void)
{
	void	   *libpq = dlopen("libpq.so.5", RTLD_NOW | RTLD_NOLOAD);

	if (!libpq)
		die("%s", dlerror());
	*(void **) &host.get = function_of(libpq, "PQgetCancel");
	*(void **) &host.cancel = function_of(libpq, "PQcancel");
	*(void **) &host.free = function_of(libpq, "PQfreeCancel");
	if (host.get == PQgetCancel)
		die("nothing stands in front of libpq");
}

/* To where the session is connected, as ruby-pg does it; and waits for the server to close. */
static void
send_packet(PGconn *session, const void *packet, size_t length)
{
	struct sockaddr_storage address;
	socklen_t	address_length = sizeof(address);
	char		answer;
	int			sock;

	if (getpeername(PQsocket(session), (struct sockaddr *) &address, &address_length) < 0)
		die("getpeername: %m");
	sock = socket(address.ss_family, SOCK_STREAM, 0);
	if (connect(sock, (struct sockaddr *) &address, address_length) < 0)
		die("connect: %m");
	if (send(sock, packet, length, 0) != (ssize_t) length)
		die("send: %m");
	if (recv(sock, &answer, 1, 0) != 0)
		die("recv: %m");
	close(sock);
}

static void
run_pid_and_key(struct context *context)
{
	PGconn	   *monitor = connect_monitor();
	struct pg_cancel_17 *ours = (struct pg_cancel_17 *) PQgetCancel(context->session);
	struct pg_cancel_17 *theirs = (struct pg_cancel_17 *) host.get(context->session);
	uint32_t	packet[4] = {htonl(sizeof(packet)), htonl(CANCEL_REQUEST_CODE), htonl(ours->be_pid), htonl(ours->be_key)};

	say("be_pid: %s", ours->be_pid == PQbackendPID(context->session) ? "the backend's" : "another");
	say("be_key: %s", ours->be_key == theirs->be_key ? "libpq's" : "another");
	start_query(context->session, monitor);
	send_packet(context->session, packet, sizeof(packet));
	say("query: %s", end_of_query(context->session));
	host.free((PGcancel *) theirs);
	PQfreeCancel((PGcancel *) ours);
	PQfinish(monitor);
}

static void
run_packet(struct context *context)
{
	PGconn	   *monitor = connect_monitor();
	struct pg_cancel_18 *ours = (struct pg_cancel_18 *) PQgetCancel(context->session);
	struct pg_cancel_18 *theirs = (struct pg_cancel_18 *) host.get(context->session);
	size_t		length = ntohl(ours->length);

	say("code: %s", ntohl(ours->code) == CANCEL_REQUEST_CODE ? "CancelRequest" : "another");
	say("pid: %s", (int) ntohl(ours->pid) == PQbackendPID(context->session) ? "the backend's" : "another");
	say("packet of %zu bytes: %s", length, memcmp(&ours->length, &theirs->length, length) == 0 ? "libpq's" : "another");
	start_query(context->session, monitor);
	send_packet(context->session, &ours->length, length);
	say("query: %s", end_of_query(context->session));
	host.free((PGcancel *) theirs);
	PQfreeCancel((PGcancel *) ours);
	PQfinish(monitor);
}

static int
cancel_and_say(const char *whose, int (*function) (PGcancel *, char *, int), PGcancel *cancel)
{
	char		errbuf[ERRBUF_SIZE] = "";
	int			result = function(cancel, errbuf, sizeof(errbuf));

	say("%s PQcancel -> %d %s", whose, result, errbuf);
	return result;
}

/* Also before anything of ours was called, which does not know then whose it is. */
static void
run_theirs_in_our_hands(struct context *context)
{
	PGconn	   *monitor = connect_monitor();

	for (int i = 0; i < 2; i++)
	{
		PGcancel   *cancel = host.get(context->session);

		start_query(context->session, monitor);
		cancel_and_say(i == 0 ? "first, our" : "then, our", PQcancel, cancel);
		say("query: %s", end_of_query(context->session));
		PQfreeCancel(cancel);
		PQfreeCancel(PQgetCancel(context->session));
	}
	PQfinish(monitor);
}

static void
run_ours_in_their_hands(struct context *context)
{
	PGconn	   *monitor = connect_monitor();
	PGcancel   *cancel = PQgetCancel(context->session);

	start_query(context->session, monitor);
	if (!cancel_and_say("libpq's", host.cancel, cancel) && query_runs(context->session, monitor))
		cancel_and_say("our", PQcancel, cancel);
	say("query: %s", end_of_query(context->session));
	host.free(cancel);
	PQfinish(monitor);
}

void
before_session(const char *scenario)
{
	(void) scenario;
	find_host();
}

const struct scenario scenarios[] = {
	{"pid-and-key", run_pid_and_key},
	{"packet", run_packet},
	{"theirs-in-our-hands", run_theirs_in_our_hands},
	{"ours-in-their-hands", run_ours_in_their_hands},
	{NULL, NULL},
};
