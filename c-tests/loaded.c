/*
 * An object to be loaded and unloaded. It tells the program when the loader is in the middle of it.
 */
#include "loaded.h"

__attribute__((constructor))
static void
construct(void)
{
	while_loading();
}

int
loaded(void)
{
	return 42;
}
