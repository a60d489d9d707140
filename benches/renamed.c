/*
 * What a libpq that was compiled for OpenSSL 1.1.1 asks for, and OpenSSL 3 has under another name only. All else has the
 * same name and the same form in both.
 */
#include <openssl/ssl.h>

#undef SSL_get_peer_certificate
extern X509 *SSL_get_peer_certificate(const SSL *ssl);

X509 *
SSL_get_peer_certificate(const SSL *ssl)
{
	return SSL_get1_peer_certificate(ssl);
}
