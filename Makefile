# pqcancel. `make demo` and `make test` set up what is missing and do everything; see README.md.
# `make test-matrix` tests with every libpq and every server, and the library on the system's OpenSSL.

CARGO   ?= cargo
PYTHON  ?= /usr/bin/python3
# vendored: a private OpenSSL inside the library. system: the distribution's.
OPENSSL ?= vendored

ifeq ($(OPENSSL),system)
FEATURES := --no-default-features
else ifneq ($(OPENSSL),vendored)
$(error OPENSSL is vendored or system, not $(OPENSSL))
endif

BUILD   := $(CARGO) build --release --locked $(FEATURES)

export CARGO_TARGET_DIR ?= target
LIBRARY := $(CARGO_TARGET_DIR)/release/libpqcancel.so
PYTEST  := PQCANCEL_LIB=$(LIBRARY) PQCANCEL_BUILD=$(CARGO_TARGET_DIR)/c-tests $(PYTHON) -m pytest c-tests -q

# rustup puts cargo here; a fresh login shell may not have looked yet.
export PATH := $(PATH):$(HOME)/.cargo/bin

.PHONY: all build header check test test-matrix unit-test c-test fuzz bench demo setup-build setup-test clean

all: build

# The second name is the soname, which programs linked with the library ask for. The drop-in stands in front of the machine's
# libpq, or of another one: LIBPQ=/path/to/libpq.so.5.
build:
	$(BUILD)
	ln -sf libpqcancel.so $(LIBRARY).1
	dropin/build.sh $(dir $(LIBRARY))dlopen $(LIBPQ)

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

demo: setup-build
	@$(MAKE) --no-print-directory build
	@$(PYTHON) demo/run.py

setup-build:
	@tools/setup.sh build

setup-test:
	@tools/setup.sh test

clean:
	$(CARGO) clean
