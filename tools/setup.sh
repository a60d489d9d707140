#!/bin/sh
# Installs what is missing on a Debian-like machine to build and demonstrate (`setup.sh build`), also to test (`setup.sh test`),
# or also to make packages (`setup.sh packages`). Does nothing where nothing is missing.
set -eu

# package: a command or file that shows it is there
build_needs='
gcc:cc
perl:perl
pkg-config:pkg-config
libclang-dev:/usr/lib/llvm-*/lib/libclang*.so*
libpq-dev:/usr/include/postgresql/libpq-fe.h
postgresql:/usr/lib/postgresql/*/bin/postgres
postgresql-client-common:psql
openssl:openssl
python3:/usr/bin/python3'
test_needs='
g++:c++
valgrind:valgrind
libssl-dev:/usr/include/openssl/ssl.h
libc6-dbg:/usr/share/doc/libc6-dbg
python3-pip:/usr/share/doc/python3-pip
python3-pytest:/usr/share/doc/python3-pytest
krb5-kdc:/usr/sbin/krb5kdc
krb5-admin-server:/usr/sbin/kadmin.local
krb5-user:kinit
npm:npm
strace:strace
groff-base:groff
pgbouncer:/usr/sbin/pgbouncer
php-cli:php
php-pgsql:/usr/share/doc/php-pgsql
libdbd-pg-perl:/usr/share/doc/libdbd-pg-perl
odbc-postgresql:/usr/lib/*/odbc/psqlodbcw.so
unixodbc-dev:/usr/include/sql.h
libpqxx-dev:/usr/include/pqxx/pqxx
python3-dev:/usr/include/python3*/Python.h
python3-psycopg2:/usr/share/doc/python3-psycopg2
python3-psycopg:/usr/share/doc/python3-psycopg
python3-pygresql:/usr/share/doc/python3-pygresql
tcl:tclsh
libpgtcl:/usr/share/doc/libpgtcl
ruby-pg:/usr/share/doc/ruby-pg
cmake:cmake'
package_needs='
dpkg-dev:dpkg-shlibdeps
rpm:rpm'

present() {
    case $1 in
        # A pattern that matches nothing stays as it is.
        /*) set -- $1; [ -e "$1" ] ;;
        *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null 2>&1; then
        sudo "$@"
    else
        echo "setup: please run as root: $*" >&2
        exit 1
    fi
}

install_packages() {
    command -v apt-get >/dev/null 2>&1 || {
        echo "setup: no apt-get here; please install the equivalents of:$*" >&2
        exit 1
    }
    as_root apt-get update -q
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "$@"
}

case ${1-} in
    build) needs=$build_needs ;;
    test) needs="$build_needs $test_needs" ;;
    packages) needs="$build_needs $test_needs $package_needs" ;;
    *) echo "usage: setup.sh build|test|packages" >&2; exit 2 ;;
esac

missing=
for need in $needs; do
    present "${need#*:}" || missing="$missing ${need%%:*}"
done
# Unquoted: a list of package names.
[ -z "$missing" ] || install_packages $missing

# Debian 12 has no Rust that is new enough; later releases have rustup.
if ! command -v cargo >/dev/null 2>&1; then
    install_packages rustup 2>/dev/null && rustup default stable || {
        echo "setup: please install Rust 1.88 or later, with rustup" >&2
        exit 1
    }
fi
