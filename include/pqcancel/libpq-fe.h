/*
 * libpq-fe.h for programs that are written for libpq 17's: the real one, and what pqcancel.h adds to it.
 *
 * It is in a directory of its own, which pqcancel.pc and the CMake config put in front of libpq's. So a program that
 * includes <libpq-fe.h> and asks for LIBPQ_HAS_ASYNC_CANCEL compiles as it is, whatever libpq it has. (`-include pqcancel.h`
 * would come before the program's own _GNU_SOURCE, and into files that have nothing to do with libpq.)
 */
#ifndef PQCANCEL_LIBPQ_FE_H
#define PQCANCEL_LIBPQ_FE_H

/* #include_next is no standard C, which -Wpedantic says everywhere but in a system's header. */
#pragma GCC system_header
#include_next <libpq-fe.h>

#include <pqcancel.h>

#endif
