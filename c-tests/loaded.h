/*
 * The object that programs load: see loaded.c.
 */
#ifndef LOADED_H
#define LOADED_H

/* The program's: called by the object's constructor, so inside dlopen(). */
void		while_loading(void);

/* The object's. */
int			loaded(void);

#endif
