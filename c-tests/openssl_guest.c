/*
 * A program that uses the system's OpenSSL by itself, as most hosts do, and cancels in between.
 *
 *     openssl_guest CONNINFO anything
 *
 * Its error queue holds one entry of its own, which must be there after each cancel, whole and alone.
 */
#define _GNU_SOURCE
#include "transcript.h"

#include <string.h>

#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/ssl.h>

#define OWN_REASON 77
#define OWN_DATA "an entry of the host's"

static void
raise_own_error(void)
{
	ERR_clear_error();
	ERR_put_error(ERR_LIB_USER, 0, OWN_REASON, "host.c", 4711);
	ERR_add_error_data(1, OWN_DATA);
}

static void
expect_own_error(const char *after)
{
	const char *file;
	const char *data;
	int			line;
	int			flags;
	unsigned long code = ERR_get_error_all(&file, &line, NULL, &data, &flags);

	if (code == 0)
		say("after %s: no entry", after);
	else if (ERR_GET_LIB(code) != ERR_LIB_USER || ERR_GET_REASON(code) != OWN_REASON || strcmp(file, "host.c") != 0 ||
		line != 4711 || strcmp(data, OWN_DATA) != 0)
		say("after %s: another entry: %lx %s:%d %s", after, code, file, line, data);
	else if ((code = ERR_get_error()) != 0)
		say("after %s: one entry more: %s", after, ERR_reason_error_string(code));
	else
		say("after %s: exactly the host's entry", after);
}

/* What the host's library was told once and for all must not be told anew by another copy of it. */
static void
expect_own_library(SSL_CTX *context)
{
	unsigned char digest[EVP_MAX_MD_SIZE];
	unsigned	size = 0;
	SSL		   *ssl = SSL_new(context);

	say("the host's library works: %d %d", ssl != NULL,
		EVP_Digest("abc", 3, digest, &size, EVP_sha256(), NULL) == 1 && size == 32 && digest[0] == 0xba);
	SSL_free(ssl);
}

int
main(int argc, char **argv)
{
	SSL_CTX    *context = SSL_CTX_new(TLS_client_method());
	PGconn	   *session;
	PGcancelConn *cancel;

	if (argc < 3)
		die("usage: openssl_guest CONNINFO anything");
	session = PQconnectdb(argv[1]);
	if (PQstatus(session) != CONNECTION_OK)
		die("session: %s", PQerrorMessage(session));
	gate("session");
	raise_own_error();
	cancel = PQcancelCreate(session);
	expect_own_error("PQcancelCreate");
	for (int i = 0; i < 2; i++)
	{
		raise_own_error();
		say("PQcancelBlocking -> %d", PQcancelBlocking(cancel));
		expect_own_error("PQcancelBlocking");
		raise_own_error();
		PQcancelReset(cancel);
		expect_own_error("PQcancelReset");
		raise_own_error();
		start(cancel);
		poll_to_end(cancel);
		expect_own_error("polling");
		PQcancelReset(cancel);
	}
	raise_own_error();
	PQcancelFinish(cancel);
	expect_own_error("PQcancelFinish");
	expect_own_library(context);
	SSL_CTX_free(context);
	PQfinish(session);
	return 0;
}
