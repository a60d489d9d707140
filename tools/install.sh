#!/bin/sh
# What `make install` and `make uninstall` do: copy what `make` has built, and remove it again. The Makefile says where.
# Nothing is built here, so that `sudo make install` leaves no file of root's in the checkout.
set -eu
umask 022

# The soname's number, and how often functions were added since; as libpq.so.5.18.
abi=1.0
soname=libpqcancel.so.1
dlopen=$LIBDIR/pqcancel/dlopen
# Where `install` notes the directories that it made.
directories=$DESTDIR$LIBDIR/pqcancel/directories

everything() {
    file 755 "$BUILT/libpqcancel.so" "$LIBDIR/libpqcancel.so.$abi"
    link "libpqcancel.so.$abi" "$LIBDIR/$soname"
    link "$soname" "$LIBDIR/libpqcancel.so"
    file 644 "$BUILT/static/libpqcancel.a" "$LIBDIR/libpqcancel.a"
    file 755 "$BUILT/dlopen/libpq.so.5" "$dlopen/libpq.so.5"
    link "$(readlink "$BUILT/dlopen/libpq-host.so.5")" "$dlopen/libpq-host.so.5"
    link "../../$soname" "$dlopen/$soname"
    file 755 "$BUILT/pqcancel" "$BINDIR/pqcancel"
    file 644 include/pqcancel.h "$INCLUDEDIR/pqcancel.h"
    file 644 include/pqcancel/libpq-fe.h "$INCLUDEDIR/pqcancel/libpq-fe.h"
    template pqcancel.pc.in "$LIBDIR/pkgconfig/pqcancel.pc"
    template cmake/pqcancel-config.cmake.in "$LIBDIR/cmake/pqcancel/pqcancel-config.cmake"
    template cmake/pqcancel-config-version.cmake.in "$LIBDIR/cmake/pqcancel/pqcancel-config-version.cmake"
    file 644 man/pqcancel.1 "$MANDIR/man1/pqcancel.1"
    file 644 man/libpqcancel.3 "$MANDIR/man3/libpqcancel.3"
}

fail() {
    echo "install: $*" >&2
    exit 1
}

check() {
    for built in libpqcancel.so static/libpqcancel.a dlopen/libpq.so.5 pqcancel; do
        [ -f "$BUILT/$built" ] || fail "$BUILT/$built is not there: run \`make\` first"
    done
    # A place that the command does not find by its own: it has to have been told when it was built.
    [ -z "$FAR_LIBDIR" ] || grep -Fq "$FAR_LIBDIR" "$BUILT/pqcancel" ||
        fail "the command would not find $LIBDIR: run \`make\` with this LIBDIR first"
}

make_directory() {
    [ -d "$1" ] && return
    make_directory "$(dirname "$1")"
    mkdir "$1"
    made="$1
$made"
}

# As pkg-config likes it: by the prefix, where it is below that.
by_prefix() {
    case $1 in
        "$PREFIX"/*) echo "\${prefix}${1#"$PREFIX"}" ;;
        *) echo "$1" ;;
    esac
}

filled() {
    [ "$OPENSSL" = system ] && private=libssl libraries=';ssl;crypto' || private= libraries=
    sed -e "s|@VERSION@|$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml)|" \
        -e "s|@SONAME@|$soname|" \
        -e "s|@PREFIX@|$PREFIX|" \
        -e "s|@LIBDIR@|$(by_prefix "$LIBDIR")|" \
        -e "s|@INCLUDEDIR@|$(by_prefix "$INCLUDEDIR")|" \
        -e "s|@INCLUDEDIR_FROM_LIBDIR@|$(realpath -ms --relative-to="$LIBDIR" "$INCLUDEDIR")|" \
        -e "s|@REQUIRES_PRIVATE@|$private|" -e "s|@LINK_PRIVATE@|$libraries|" "$1"
}

# The loader's cache, if the loader looks into LIBDIR at all.
refresh_cache() {
    if [ -z "$DESTDIR" ] && [ "$(id -u)" = 0 ] && ldconfig -N -X -v 2>/dev/null | grep -Fq "$LIBDIR: "; then
        ldconfig
    fi
}

install_everything() {
    made=
    file() {
        make_directory "$(dirname "$DESTDIR$3")"
        install -m "$1" "$2" "$DESTDIR$3"
    }
    link() {
        make_directory "$(dirname "$DESTDIR$2")"
        ln -sfn "$1" "$DESTDIR$2"
    }
    template() {
        make_directory "$(dirname "$DESTDIR$2")"
        filled "$1" | install -m 644 /dev/stdin "$DESTDIR$2"
    }
    everything
    # In a staged tree (DESTDIR) all directories are ours, and it holds nothing but what is to be installed.
    if [ -z "$DESTDIR" ] && [ -n "$made" ]; then
        { printf %s "$made"; cat "$directories" 2>/dev/null || :; } >"$directories.new"
        mv "$directories.new" "$directories"
    fi
}

uninstall_everything() {
    file() { remove "$3"; }
    link() { remove "$2"; }
    template() { remove "$2"; }
    remove() {
        rm -f "$DESTDIR$1"
        [ -z "$DESTDIR" ] ||
            (cd "$DESTDIR" && rmdir --parents --ignore-fail-on-non-empty "$(dirname "${1#/}")") 2>/dev/null || :
    }
    made=$(cat "$directories" 2>/dev/null || :)
    rm -f "$directories"
    everything
    echo "$made" | while read -r directory; do
        rmdir "$directory" 2>/dev/null || :
    done
}

case $1 in
    install) check; install_everything ;;
    uninstall) uninstall_everything ;;
    *) echo "usage: install.sh install|uninstall" >&2; exit 2 ;;
esac
refresh_cache
