#!/bin/sh
# Makes a drop-in (see libpq.c): build.sh DIRECTORY [LIBPQ]. LIBPQ is the real libpq.so.5, by default the machine's.
# In the directory, or in the one above it, libpqcancel.so.1 has to be, for programs that do not preload it.
set -eu
export LC_ALL=C
unset LD_LIBRARY_PATH LD_PRELOAD

here=$(dirname "$0")
directory=$1
libpq=${2-}
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT

compile() {
    ${CC:-cc} -std=c11 -O2 -Wall -Wextra -Werror -shared -fPIC -fvisibility=hidden -Wl,--no-as-needed "$@"
}

# An empty library of this name: who is linked with it needs one of its name, whatever that really holds.
stand_in() {
    compile -Wl,-soname,"$1" -o "$made/$1" -x c /dev/null
}

# As the loader finds it for a program without a RUNPATH; else where pkg-config says that linkers do.
machines_libpq() {
    stand_in libpq.so.5
    compile -o "$made/program" -x c /dev/null -x none "$made/libpq.so.5"
    found=$(ldd "$made/program" | sed -n 's/^\tlibpq\.so\.5 => \(\/.*\) (0x.*/\1/p')
    echo "${found:-$(pkg-config --variable=libdir libpq)/libpq.so.5}"
}

# Programs linked with a libpq that has symbol versions (Red Hat's RHPG_*) ask libpq.so.5 for those versions by name when
# they start, before they look for a symbol. All symbols themselves are the real libpq's, or without a version here.
symbol_versions() {
    objdump --private-headers "$1" | sed -n '/^Version definitions:/,/^$/ s/^[0-9]* 0x0[02] 0x[0-9a-f]* \(.*\)/\1 {};/p'
}

[ -n "$libpq" ] || libpq=$(machines_libpq)
[ -f "$libpq" ] || { echo "build.sh: $libpq is not there" >&2; exit 1; }
symbol_versions "$libpq" >"$made/versions"
stand_in libpqcancel.so.1
stand_in libpq-host.so.5
# It is never unloaded. Nor is the libpq behind it, once that was asked for a cancel: it bears the same soname, and alone it
# would be what the next one gets who opens libpq.so.5.
compile -I"$here/../include" $(pkg-config --cflags libpq) -o "$made/libpq.so.5" "$here/libpq.c" \
    "$made/libpqcancel.so.1" "$made/libpq-host.so.5" -Wl,-soname,libpq.so.5 -Wl,-z,defs,-z,nodelete \
    -Wl,--enable-new-dtags,-rpath,'$ORIGIN:$ORIGIN/..' \
    $([ ! -s "$made/versions" ] || echo "-Wl,--version-script=$made/versions")

mkdir -p "$directory"
# By a rename, because programs may be using the one that is there.
cp "$made/libpq.so.5" "$directory/libpq.so.5.new"
mv -f "$directory/libpq.so.5.new" "$directory/libpq.so.5"
ln -sfn "$(realpath -s "$libpq")" "$directory/libpq-host.so.5"
