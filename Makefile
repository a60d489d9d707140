# pqcancel. `make demo` and `make test` set up what is missing and do everything; see README.md.
# `make test-matrix` tests with every libpq and every server, and the library on the system's OpenSSL.
# `make && sudo make install` puts it into the system, `make deb` and `make rpm` into a package.

CARGO   ?= cargo
PYTHON  ?= /usr/bin/python3
# vendored: a private OpenSSL inside the library. system: the distribution's.
OPENSSL ?= vendored

ifeq ($(OPENSSL),system)
FEATURES := --no-default-features
else ifneq ($(OPENSSL),vendored)
$(error OPENSSL is vendored or system, not $(OPENSSL))
endif

# Where `make install` puts things. On Debian a package has LIBDIR=/usr/lib/x86_64-linux-gnu, on Red Hat LIBDIR=/usr/lib64.
PREFIX     ?= /usr/local
BINDIR     ?= $(PREFIX)/bin
LIBDIR     ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
MANDIR     ?= $(PREFIX)/share/man

# The command looks for the library from its own place (src/bin/pqcancel/library.rs). Of any other LIBDIR it has to be told
# when it is built.
MULTIARCH  := $(shell uname -m)-linux-gnu
FAR_LIBDIR := $(filter-out $(addprefix $(dir $(BINDIR)),lib lib64 lib/$(MULTIARCH)),$(LIBDIR))
ifneq ($(FAR_LIBDIR),)
export PQCANCEL_LIBDIR := $(FAR_LIBDIR)
endif

# Not with our DESTDIR and LIBDIR, which the make of OpenSSL would take for its own.
BUILD   := env -u MAKEFLAGS $(CARGO) build --release --locked $(FEATURES)

export CARGO_TARGET_DIR ?= target
BUILT   := $(CARGO_TARGET_DIR)/release
LIBRARY := $(BUILT)/libpqcancel.so
INSTALL  = BUILT='$(BUILT)' OPENSSL='$(OPENSSL)' DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' BINDIR='$(BINDIR)' LIBDIR='$(LIBDIR)' \
	INCLUDEDIR='$(INCLUDEDIR)' MANDIR='$(MANDIR)' FAR_LIBDIR='$(FAR_LIBDIR)' tools/install.sh
PYTEST  := PQCANCEL_LIB=$(LIBRARY) PQCANCEL_BUILD=$(CARGO_TARGET_DIR)/c-tests $(PYTHON) -m pytest c-tests -q

# rustup puts cargo here; a fresh login shell may not have looked yet.
export PATH := $(PATH):$(HOME)/.cargo/bin

.PHONY: all build install uninstall deb rpm header check test test-matrix test-packages unit-test c-test fuzz bench demo \
	setup-build setup-test setup-packages clean

all: build

# The second name is the soname, which programs linked with the library ask for. The drop-in stands in front of the machine's
# libpq, or of another one: LIBPQ=/path/to/libpq.so.5.
build:
	$(BUILD)
	ln -sf libpqcancel.so $(LIBRARY).1
	dropin/build.sh $(BUILT)/dlopen $(LIBPQ)
	tools/archive.sh $(BUILT)

# They build nothing: first `make`, then perhaps `sudo make install`.
install:
	@$(INSTALL) install

uninstall:
	@$(INSTALL) uninstall

# For the distribution that this is: with its libc, and in front of its libpq.
deb rpm: build
	tools/package.sh $@ $(BUILT)

# The generated header, as this build made it. A test fails while the committed one differs.
header: build
	$(CARGO) run --release --locked $(FEATURES) --quiet --example header > include/pqcancel.h.new
	mv include/pqcancel.h.new include/pqcancel.h

check:
	$(CARGO) fmt --check
	$(CARGO) clippy --release --locked $(FEATURES) --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --locked $(FEATURES) --no-deps --quiet

unit-test:
	$(CARGO) test --release --locked $(FEATURES) --lib --tests

c-test: build
	$(PYTEST)

# Needs a nightly Rust and cargo-fuzz; a minute for each target.
fuzz:
	cd fuzz && for target in machine tls sockaddr; do \
	    $(CARGO) +nightly fuzz run $$target -- -max_total_time=60 || exit 1; \
	done

# Side by side with libpq 18: a table, and a chart below target/bench. Some minutes, best on a quiet machine.
bench: setup-test
	$(MAKE) build
	$(PYTHON) benches/run.py --lib $(LIBRARY)

test: setup-test
	$(MAKE) build check unit-test c-test

test-matrix: setup-test
	$(MAKE) build
	$(PYTEST) -m matrix
	$(MAKE) OPENSSL=system CARGO_TARGET_DIR=target/system build unit-test c-test

# Packages are installed and removed in a copy of the system. The first time the tools that make them are built.
test-packages: setup-packages
	$(MAKE) deb rpm
	$(PYTEST) -m packages

demo: setup-build
	@$(MAKE) --no-print-directory build
	@$(PYTHON) demo/run.py

setup-build:
	@tools/setup.sh build

setup-test:
	@tools/setup.sh test

setup-packages:
	@tools/setup.sh packages

clean:
	$(CARGO) clean
