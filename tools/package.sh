#!/bin/sh
# Makes a package of what `make` has built in a directory: package.sh deb|rpm DIRECTORY. It holds what `make install` installs;
# the rest is in Cargo.toml, package.metadata. The result is in DIRECTORY/package.
set -eu
umask 022
export LC_ALL=C

kind=$1
built=$2
tools=${CARGO_TARGET_DIR:-target}/tools
stage=$built/package/$kind
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml)
maintainer=$(sed -n 's/^maintainer = "\(.*\)"$/\1/p' Cargo.toml)
# The same sources make the same package.
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}"

# tool NAME VERSION: the cargo command of this name. Without optimization, because it runs for seconds and builds for minutes.
tool() {
    [ "$("$tools/bin/$1" --version 2>/dev/null)" = "$1 $2" ] ||
        CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR="$tools/build" \
            cargo install --quiet --locked --debug --root "$tools" "$1@$2"
}

# stage LIBDIR
stage() {
    rm -rf "$stage" "$stage".*
    mkdir -p "$stage"
    env -u MAKEFLAGS make --no-print-directory install BUILT="$built" DESTDIR="$(realpath "$stage")" \
        PREFIX=/usr BINDIR=/usr/bin LIBDIR="$1" INCLUDEDIR=/usr/include MANDIR=/usr/share/man
    ${STRIP:-strip} --strip-unneeded "$stage"/usr/bin/* "$stage$1"/libpqcancel.so.*.* "$stage$1"/pqcancel/dlopen/libpq.so.5
    gzip -9n "$stage"/usr/share/man/man*/*
}

deb() {
    tool cargo-deb 3.8.0
    stage "/usr/lib/$(uname -m)-linux-gnu"
    printf 'pqcancel (%s-1) unstable; urgency=medium\n\n  * See changelog.gz.\n\n -- %s  %s\n' \
        "$version" "$maintainer" "$(date -uRd "@$SOURCE_DATE_EPOCH")" >"$stage.changelog"
    "$tools/bin/cargo-deb" --quiet --no-build --no-strip --compress-type gz --compress-system --output "$stage.deb"
    complete "$stage.deb"
}

# What cargo-deb does not tell: on which libc what is in a library depends, on what those depend who are linked with it, and
# the files' sums.
complete() {
    dpkg-deb --raw-extract "$1" "$stage.whole"
    mkdir "$stage.whole/debian"
    touch "$stage.whole/debian/control"
    needed=$(cd "$stage.whole" && dpkg-shlibdeps -O "$PWD"/usr/bin/pqcancel "$PWD"/usr/lib/*/libpqcancel.so.*.* |
        sed 's/^shlibs:Depends=//')
    sed -i "s/^Depends: /&$needed, /" "$stage.whole/DEBIAN/control"
    echo "libpqcancel 1 pqcancel" >"$stage.whole/DEBIAN/shlibs"
    (cd "$stage.whole" && find usr -type f -exec md5sum {} + | sort -k 2 >DEBIAN/md5sums)
    rm -r "$1" "$stage.whole/debian"
    dpkg-deb --root-owner-group --build "$stage.whole" "$built/package/"
    rm -r "$stage.whole"
}

# Symbolic links and directories are beyond cargo-generate-rpm: the package makes the links when it is installed, and removes
# both in the end.
rpm() {
    tool cargo-generate-rpm 0.21.1
    stage /usr/lib64
    install -D -m 644 -t "$stage/usr/share/doc/pqcancel" README.md CHANGELOG.md
    install -D -m 644 -t "$stage/usr/share/licenses/pqcancel" LICENSE
    links=$(cd "$stage" && find . -type l -printf '/%P %l\n' | sort)
    directories=$(cd "$stage" && find usr -depth -type d \( -name pqcancel -o -name dlopen \) -printf '/%p\n')
    {
        echo "$links" | sed 's/\(.*\) \(.*\)/ln -sfn \2 \1/'
        echo /sbin/ldconfig
    } >"$stage.post"
    {
        echo 'if [ "$1" = 0 ]; then'
        echo "$links" | sed 's/\(.*\) .*/    rm -f \1/'
        echo "$directories" | sed 's/.*/    rmdir & 2>\/dev\/null/'
        echo fi
        echo /sbin/ldconfig
    } >"$stage.postun"
    find "$stage" -type l -exec rm {} +
    "$tools/bin/cargo-generate-rpm" --payload-compress gzip --output "$built/package/" -s "requires = { $(requirements) }" \
        -s "post_install_script = \"$stage.post\"" -s "post_uninstall_script = \"$stage.postun\""
}

# What the command and the library need, as rpm puts it: other libraries, and the latest version of libc's symbols. And a libpq
# for the drop-in.
requirements() {
    programs="$stage/usr/bin/pqcancel $(ls "$stage"/usr/lib64/libpqcancel.so.*.*)"
    {
        echo libpq.so.5
        objdump --private-headers $programs | sed -n 's/^  NEEDED *//p'
    } | sort -u | sed 's/.*/"&()(64bit)" = "*",/' | tr '\n' ' '
    objdump --dynamic-syms $programs | sed -n 's/.*(\(GLIBC_[0-9.]*\)).*/\1/p' | sort -Vu | tail -n 1 |
        sed 's/.*/"libc.so.6(&)(64bit)" = "*"/'
}

"$kind" >/dev/null
ls "$built/package/"*."$kind"
