/*
 * A program with an OpenSSL of its own, of whatever version and however linked: it visits a website with it before, between
 * and after cancels. Only functions that every OpenSSL since 1.1.0 has under the same name are called.
 *
 *     foreign_openssl CONNINFO PORT CA [own-allocator]
 *
 * DRIVER_MONITOR as for driver.c. With own-allocator the program's OpenSSL allocates by functions of the program, which
 * count, and know a block that is not theirs.
 */
#define _GNU_SOURCE
#include "transcript.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <openssl/bio.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>

#include "query.h"
#include "session.h"

#define WATCHDOG_SECONDS 600
#define MOST_ERRORS 16

/* The program's allocator. */

#define MARK 0x6f776e2d626c6f63u

struct head
{
	_Alignas(max_align_t) unsigned long mark;
};

static _Atomic unsigned long allocator_calls;

static void *
own_realloc(void *block, size_t size, const char *file, int line)
{
	struct head *head = block ? (struct head *) block - 1 : NULL;

	(void) file;
	(void) line;
	allocator_calls++;
	if (head && head->mark != MARK)
		die("a block that is not the program's");
	if (size == 0)
	{
		free(head);
		return NULL;
	}
	head = realloc(head, sizeof(*head) + size);
	if (!head)
		return NULL;
	head->mark = MARK;
	return head + 1;
}

static void *
own_malloc(size_t size, const char *file, int line)
{
	return own_realloc(NULL, size, file, line);
}

static void
own_free(void *block, const char *file, int line)
{
	own_realloc(block, 0, file, line);
}

/* The program's errors. */

struct errors
{
	unsigned long codes[MOST_ERRORS];
};

static void
raise_errors(void)
{
	ERR_clear_error();
	if (BIO_new_file("/nonexistent/file", "r"))
		die("a file that does not exist was opened");
}

static struct errors
take_errors(void)
{
	struct errors taken = {{0}};

	for (int i = 0; i < MOST_ERRORS && (taken.codes[i] = ERR_get_error()) != 0; i++)
		;
	return taken;
}

/* The program's TLS. */

static int
connect_to(const char *port)
{
	struct sockaddr_in address = {.sin_family = AF_INET,.sin_port = htons((uint16_t) atoi(port)),
	.sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	int			sock = socket(AF_INET, SOCK_STREAM, 0);

	if (sock < 0 || connect(sock, (struct sockaddr *) &address, sizeof(address)) < 0)
		die("website: %m");
	return sock;
}

static void
read_page(SSL *ssl, char *page, int size)
{
	static const char request[] = "GET / HTTP/1.0\r\n\r\n";
	int			length = 0;
	int			got;

	if (SSL_write(ssl, request, sizeof(request) - 1) <= 0)
		die("SSL_write: %s", ERR_error_string(ERR_get_error(), NULL));
	while ((got = SSL_read(ssl, page + length, size - 1 - length)) > 0)
		length += got;
	page[length] = '\0';
}

static int	visits;

static void
visit(const char *port, const char *ca)
{
	SSL_CTX    *context = SSL_CTX_new(TLS_client_method());
	SSL		   *ssl;
	int			sock = connect_to(port);
	char		page[4096];
	unsigned char digest[EVP_MAX_MD_SIZE];
	unsigned	size = 0;

	ERR_clear_error();
	if (!context || SSL_CTX_load_verify_locations(context, ca, NULL) != 1)
		die("context: %s", ERR_error_string(ERR_get_error(), NULL));
	SSL_CTX_set_verify(context, SSL_VERIFY_PEER, NULL);
	ssl = SSL_new(context);
	if (SSL_set1_host(ssl, "localhost") != 1 || SSL_set_fd(ssl, sock) != 1 || SSL_connect(ssl) != 1)
		die("SSL_connect: %s", ERR_error_string(ERR_get_error(), NULL));
	read_page(ssl, page, sizeof(page));
	EVP_Digest("abc", 3, digest, &size, EVP_sha256(), NULL);
	say("visit %d: %.12s, %s, digest %02x%02x", ++visits, page, SSL_get_version(ssl), digest[0], digest[1]);
	SSL_shutdown(ssl);
	SSL_free(ssl);
	SSL_CTX_free(context);
	close(sock);
}

/* The cancels. */

static bool
cancel_by_blocking(PGconn *session)
{
	PGcancelConn *cancel = PQcancelCreate(session);
	bool		delivered = PQcancelBlocking(cancel) == 1;

	PQcancelFinish(cancel);
	return delivered;
}

static bool
cancel_by_polling(PGconn *session)
{
	PGcancelConn *cancel = PQcancelCreate(session);
	PostgresPollingStatusType wanted = PQcancelStart(cancel) ? PGRES_POLLING_WRITING : PGRES_POLLING_FAILED;

	while (wanted != PGRES_POLLING_OK && wanted != PGRES_POLLING_FAILED)
	{
		wait_until_ready(PQcancelSocket(cancel), wanted);
		wanted = PQcancelPoll(cancel);
	}
	PQcancelFinish(cancel);
	return wanted == PGRES_POLLING_OK;
}

static bool
cancel_by_old_functions(PGconn *session)
{
	char		errbuf[256];
	PGcancel   *cancel = PQgetCancel(session);
	bool		delivered = PQcancel(cancel, errbuf, sizeof(errbuf)) == 1;

	PQfreeCancel(cancel);
	return delivered;
}

static const struct
{
	const char *name;
	bool		(*cancel) (PGconn *session);
}			ways[] = {
	{"blocking", cancel_by_blocking},
	{"polled", cancel_by_polling},
	{"old", cancel_by_old_functions},
	{"blocking again", cancel_by_blocking},
};

static void
cancel_by_each(PGconn *session, const char *port, const char *ca)
{
	PGconn	   *monitor = connect_monitor();
	struct errors expected;

	raise_errors();
	expected = take_errors();
	if (expected.codes[0] == 0)
		die("no error was raised");
	for (size_t i = 0; i < sizeof(ways) / sizeof(*ways); i++)
	{
		unsigned long calls;
		struct errors found;
		bool		delivered;

		start_query(session, monitor);
		raise_errors();
		calls = allocator_calls;
		delivered = ways[i].cancel(session);
		calls = allocator_calls - calls;
		found = take_errors();
		say("%s: delivered=%d, allocator called %lu times, errors %s", ways[i].name, delivered, calls,
			memcmp(&expected, &found, sizeof(found)) == 0 ? "as before" : "changed");
		say("%s: SQLSTATE %s", ways[i].name, end_of_query(session));
		visit(port, ca);
	}
	PQfinish(monitor);
}

int
main(int argc, char **argv)
{
	bool		own_allocator = argc == 5 && strcmp(argv[4], "own-allocator") == 0;
	PGconn	   *session;

	if (argc != 4 && !own_allocator)
		die("usage: foreign_openssl CONNINFO PORT CA [own-allocator]");
	alarm(WATCHDOG_SECONDS);
	if (own_allocator && CRYPTO_set_mem_functions(own_malloc, own_realloc, own_free) != 1)
		die("OpenSSL has allocated already");
	say("%s", OpenSSL_version(OPENSSL_VERSION));
	visit(argv[2], argv[3]);
	session = connect_session(argv[1]);
	if (PQstatus(session) != CONNECTION_OK)
		die("session: %s", PQerrorMessage(session));
	say("libpq %d, ssl=%d", PQlibVersion() / 10000, PQsslInUse(session));
	cancel_by_each(session, argv[2], argv[3]);
	PQfinish(session);
	visit(argv[2], argv[3]);
	say("allocator called: %s", allocator_calls > 0 ? "yes" : "no");
	return 0;
}
