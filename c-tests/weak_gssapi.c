/*
 * A GSSAPI library that lets its callers down: it stands in front of the real one and hands everything on, but does not do for
 * the second security context and all that follow (the first is the session's) what WEAK_GSSAPI names. With "lock" each context
 * holds a lock, from its beginning to its end, that the next has to wait for.
 *
 * The declarations are those of RFC 2744, with nothing known of what is behind a pointer.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GSS_S_FAILURE (13u << 16)
#define GSS_S_CONTINUE_NEEDED 1u
#define GSS_C_MUTUAL_FLAG 2u
#define GSS_C_CONF_FLAG 16u
#define GSS_C_INTEG_FLAG 32u
#define LARGE 20000

struct buffer
{
	size_t		length;
	void	   *value;
};

typedef uint32_t init_function(uint32_t *minor, void *credential, void **context, void *target, void *mechanism, uint32_t flags,
							   uint32_t lifetime, void *bindings, struct buffer *token, void **actual_mechanism,
							   struct buffer *answer, uint32_t *actual_flags, uint32_t *actual_lifetime);
typedef uint32_t wrap_function(uint32_t *minor, void *context, int confidential, uint32_t quality, struct buffer *plaintext,
							   int *is_confidential, struct buffer *packet);
typedef uint32_t delete_function(uint32_t *minor, void **context, struct buffer *token);

extern init_function gss_init_sec_context;
extern wrap_function gss_wrap;
extern delete_function gss_delete_sec_context;

static int	contexts;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static bool
is_named(const char *what)
{
	const char *weakness = getenv("WEAK_GSSAPI");

	return weakness && strcmp(weakness, what) == 0;
}

static bool
fails(const char *what)
{
	return contexts > 1 && is_named(what);
}

static void *
real(const char *name)
{
	void	   *function = dlsym(RTLD_NEXT, name);

	if (!function)
	{
		fprintf(stderr, "%s\n", dlerror());
		abort();
	}
	return function;
}

uint32_t
gss_init_sec_context(uint32_t *minor, void *credential, void **context, void *target, void *mechanism, uint32_t flags,
					 uint32_t lifetime, void *bindings, struct buffer *token, void **actual_mechanism, struct buffer *answer,
					 uint32_t *actual_flags, uint32_t *actual_lifetime)
{
	init_function *init = (init_function *) real(__func__);
	uint32_t	major;

	if (!*context && is_named("lock"))
		pthread_mutex_lock(&lock);
	if (!*context)
		contexts++;
	if (fails("flags"))
		flags &= ~(GSS_C_CONF_FLAG | GSS_C_INTEG_FLAG);
	major = init(minor, credential, context, target, mechanism, flags, lifetime, bindings, token, actual_mechanism, answer,
				 actual_flags, actual_lifetime);
	if (fails("told-confidentiality") && actual_flags)
		*actual_flags &= ~GSS_C_CONF_FLAG;
	if (fails("told-mutual") && actual_flags)
		*actual_flags &= ~GSS_C_MUTUAL_FLAG;
	if (fails("end") && major == 0)
		major = GSS_S_CONTINUE_NEEDED;
	if (fails("large-token") && answer->length > 0)
	{
		answer->value = realloc(answer->value, 4 * LARGE);
		answer->length = 4 * LARGE;
	}
	return major;
}

uint32_t
gss_wrap(uint32_t *minor, void *context, int confidential, uint32_t quality, struct buffer *plaintext, int *is_confidential,
		 struct buffer *packet)
{
	wrap_function *wrap = (wrap_function *) real(__func__);
	uint32_t	major;

	if (fails("wrap"))
	{
		*minor = 0;
		return GSS_S_FAILURE;
	}
	major = wrap(minor, context, confidential && !fails("confidentiality"), quality, plaintext, is_confidential, packet);
	if (fails("large-packet"))
	{
		packet->value = realloc(packet->value, LARGE);
		packet->length = LARGE;
	}
	return major;
}

uint32_t
gss_delete_sec_context(uint32_t *minor, void **context, struct buffer *token)
{
	delete_function *delete = (delete_function *) real(__func__);

	if (is_named("lock"))
		pthread_mutex_unlock(&lock);
	return delete(minor, context, token);
}
