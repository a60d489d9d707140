#!/bin/sh
# Makes the static library: archive.sh DIRECTORY, with what cargo has built in it. The result is DIRECTORY/static/libpqcancel.a.
#
# Cargo's own libpqcancel.a would hand its OpenSSL, thousands of symbols, to the whole program, libpq included. So all of it
# becomes one object, in which every name is local but for those that the shared library exports. Needs GNU binutils.
set -eu
export LC_ALL=C

directory=$1
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

nm --dynamic --defined-only --format=posix "$directory/libpqcancel.so" | cut -d' ' -f1 >"$made/exports"
[ -s "$made/exports" ]

# The unwinder comes from the compiler's archive, as in the shared library.
unwinder=$(${CC:-cc} -print-file-name=libgcc_eh.a)
[ -f "$unwinder" ] || unwinder=

# -d: commons become definitions, because commons cannot be made local. Nor do section groups stay: a linker keeps one of each
# name, and would take that of another Rust library in the program for ours.
${LD:-ld} --relocatable -d --force-group-allocation --gc-sections $(sed 's/^/--undefined=/' "$made/exports") \
    -o "$made/all.o" "$directory/libpqcancel.a" $unwinder
# The bitcode in Rust's standard library is of no use here, and older tools trip over it.
${OBJCOPY:-objcopy} --keep-global-symbols="$made/exports" --strip-unneeded \
    --remove-section=.llvmbc --remove-section=.llvmcmd --remove-section=.comment "$made/all.o" "$made/pqcancel.o"

mkdir -p "$directory/static"
rm -f "$made/libpqcancel.a"
${AR:-ar} crsD "$made/libpqcancel.a" "$made/pqcancel.o"
mv -f "$made/libpqcancel.a" "$directory/static/libpqcancel.a"
