/*
 * The transcript: see transcript.h.
 */
#define _GNU_SOURCE
#include "transcript.h"

#include <dirent.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define DEADLINE_MS 100000
#define LINE_SIZE 8192

static char last_line[LINE_SIZE];
static int	last_socket = -1;
static const char *made_gate = "made";	/* what CONNECTION_MADE means: the connection, or its encryption */

_Noreturn void
die_impl(const char *file, int line, const char *format,...)
{
	va_list		args;

	fflush(stdout);
	fprintf(stderr, "%s:%d: ", file, line);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	exit(3);
}

void
say(const char *format,...)
{
	char		line[LINE_SIZE];
	va_list		args;

	va_start(args, format);
	vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	if (strcmp(line, last_line) == 0)
		return;
	strcpy(last_line, line);
	puts(line);
	fflush(stdout);				/* so that a crash loses nothing */
}

/* By number: CONNECTION_ALLOCATED and some others are not in every libpq-fe.h. */
static const char *
status_name(ConnStatusType status)
{
	static const char *const names[] = {
		"OK", "BAD", "STARTED", "MADE", "AWAITING_RESPONSE", "AUTH_OK", "SETENV", "SSL_STARTUP", "NEEDED",
		"CHECK_WRITABLE", "CONSUME", "GSS_STARTUP", "CHECK_TARGET", "CHECK_STANDBY", "ALLOCATED", "AUTHENTICATING"
	};
	unsigned	number = (unsigned) status;

	return number < sizeof(names) / sizeof(names[0]) ? names[number] : "unknown";
}

static const char *
polling_name(PostgresPollingStatusType status)
{
	switch (status)
	{
		case PGRES_POLLING_FAILED:
			return "FAILED";
		case PGRES_POLLING_READING:
			return "READING";
		case PGRES_POLLING_WRITING:
			return "WRITING";
		case PGRES_POLLING_OK:
			return "OK";
		default:
			return "unknown";
	}
}

static void
escape(char *to, size_t size, const char *from)
{
	char	   *end = to + size - 5;

	for (; *from && to < end; from++)
	{
		unsigned char c = (unsigned char) *from;

		if (c == '\n')
			to += sprintf(to, "\\n");
		else if (c == '"' || c == '\\')
			to += sprintf(to, "\\%c", c);
		else if (c < 0x20 || c == 0x7f)
			to += sprintf(to, "\\x%02x", c);
		else
			*to++ = (char) c;
	}
	*to = '\0';
}

static int
socket_option(int sock, int level, int option)
{
	int			value = -1;
	socklen_t	size = sizeof(value);

	/* Not every option exists on Unix sockets: then -1 is what both libraries show. */
	(void) getsockopt(sock, level, option, &value, &size);
	return value;
}

/* What a caller's process and the network see of a socket that has just been made. */
static void
say_socket(int sock)
{
	if (sock == last_socket)
		return;
	last_socket = sock;
	if (sock < 0)
		return;
	say("  new socket: nonblocking=%d cloexec=%d nodelay=%d keepalive=%d idle=%d interval=%d count=%d user_timeout=%d",
		(fcntl(sock, F_GETFL) & O_NONBLOCK) != 0, (fcntl(sock, F_GETFD) & FD_CLOEXEC) != 0,
		socket_option(sock, IPPROTO_TCP, TCP_NODELAY), socket_option(sock, SOL_SOCKET, SO_KEEPALIVE),
		socket_option(sock, IPPROTO_TCP, TCP_KEEPIDLE), socket_option(sock, IPPROTO_TCP, TCP_KEEPINTVL),
		socket_option(sock, IPPROTO_TCP, TCP_KEEPCNT), socket_option(sock, IPPROTO_TCP, TCP_USER_TIMEOUT));
}

void
say_call(const char *function, const char *result, PGcancelConn *cancel)
{
	char		message[LINE_SIZE / 2];
	int			sock = PQcancelSocket(cancel);

	escape(message, sizeof(message), PQcancelErrorMessage(cancel));
	say("%s -> %s  status=%s socket=%s error=\"%s\"", function, result, status_name(PQcancelStatus(cancel)),
		sock == -1 ? "-1" : "open", message);
	say_socket(sock);
}

PGcancelConn *
create(PGconn *session)
{
	PGcancelConn *cancel = PQcancelCreate(session);

	last_socket = -1;
	made_gate = "made";
	say_call("PQcancelCreate", cancel ? "object" : "NULL", cancel);
	return cancel;
}

int
start(PGcancelConn *cancel)
{
	int			result = PQcancelStart(cancel);

	say_call("PQcancelStart", result == 1 ? "1" : result == 0 ? "0" : "unknown", cancel);
	return result;
}

int
blocking(PGcancelConn *cancel)
{
	int			result = PQcancelBlocking(cancel);

	say_call("PQcancelBlocking", result == 1 ? "1" : result == 0 ? "0" : "unknown", cancel);
	return result;
}

PostgresPollingStatusType
poll_once(PGcancelConn *cancel)
{
	ConnStatusType before = PQcancelStatus(cancel);
	PostgresPollingStatusType result = PQcancelPoll(cancel);

	/* Whether a handshake has to wait for the server at all depends on how fast the server is. */
	if ((before == CONNECTION_SSL_STARTUP || before == CONNECTION_GSS_STARTUP) && PQcancelStatus(cancel) == before &&
		result == PGRES_POLLING_READING)
		return result;
	say_call("PQcancelPoll", polling_name(result), cancel);
	return result;
}

void
reset(PGcancelConn *cancel)
{
	PQcancelReset(cancel);
	last_socket = -1;
	made_gate = "made";
	say_call("PQcancelReset", "void", cancel);
}

void
finish(PGcancelConn *cancel)
{
	PQcancelFinish(cancel);
	say("PQcancelFinish");
}

/* The socket on which the test speaks to us, or -1. */
static int
control_socket(void)
{
	const char *fd = getenv("DRIVER_CONTROL_FD");

	return fd ? atoi(fd) : -1;
}

bool
wait_until_ready(int sock, PostgresPollingStatusType wanted)
{
	struct pollfd fds[2] = {
		{.fd = sock,.events = wanted == PGRES_POLLING_READING ? POLLIN : POLLOUT},
		{.fd = control_socket(),.events = POLLIN},
	};
	int			ready;

	if (sock < 0)
		die("asked to wait for a socket that is not there; last line: %s", last_line);
	ready = poll(fds, 2, DEADLINE_MS);
	if (ready < 0)
		die("poll: %m");
	if (ready == 0)
		die("nothing happened for %d ms; last line: %s", DEADLINE_MS, last_line);
	return fds[0].revents != 0;
}

/* The point in a cancel's life where the next PQcancelPoll begins, as named in DRIVER_GATES. */
static void
poll_gate(PGcancelConn *cancel)
{
	ConnStatusType status = PQcancelStatus(cancel);

	if (status == CONNECTION_SSL_STARTUP)
	{
		if (strcmp(made_gate, "made-tls") == 0)
			gate("hello-sent");
		made_gate = "made-tls";
	}
	else if (status == CONNECTION_GSS_STARTUP)
		made_gate = "made-gss";
	else if (status == CONNECTION_STARTED)
		gate("started");
	else if (status == CONNECTION_MADE)
		gate(made_gate);
	else if (status == CONNECTION_AWAITING_RESPONSE)
		gate("awaiting");
}

PostgresPollingStatusType
poll_to_end(PGcancelConn *cancel)
{
	PostgresPollingStatusType wanted = PGRES_POLLING_WRITING;

	while (wanted == PGRES_POLLING_READING || wanted == PGRES_POLLING_WRITING)
	{
		poll_gate(cancel);
		if (!wait_until_ready(PQcancelSocket(cancel), wanted))
		{
			say("stuck waiting for %s", polling_name(wanted));
			break;
		}
		wanted = poll_once(cancel);
	}
	return wanted;
}

/* Is name among those in DRIVER_GATES, and not passed yet? */
static bool
gate_is_closed(const char *name)
{
	static char passed[256] = ",";
	char		item[64];
	char		wanted[256];
	const char *gates = getenv("DRIVER_GATES");

	if (!gates)
		return false;
	snprintf(item, sizeof(item), ",%s,", name);
	snprintf(wanted, sizeof(wanted), ",%s,", gates);
	if (!strstr(wanted, item) || strstr(passed, item))
		return false;
	strncat(passed, item + 1, sizeof(passed) - strlen(passed) - 1);
	return true;
}

void
gate(const char *name)
{
	int			control = control_socket();
	char		answer;

	if (!gate_is_closed(name))
		return;
	if (dprintf(control, "%s\n", name) < 0)
		die("gate %s: cannot tell the test: %m", name);
	if (read(control, &answer, 1) != 1)
		die("gate %s: no answer from the test: %m", name);
}

int
open_descriptors(void)
{
	DIR		   *directory = opendir("/proc/self/fd");
	int			count = 0;

	if (!directory)
		die("/proc/self/fd: %m");
	while (readdir(directory))
		count++;
	closedir(directory);
	return count;
}
