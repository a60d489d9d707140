"""Fixtures of the C tests: servers, certificates, and the drivers, compiled once for each run."""

from __future__ import annotations

import signal
import subprocess
from contextlib import ExitStack

import pytest

import certs as certs_module
import comparison
import legacy
import matrix
import peers
import programs
from eavesdropper import Eavesdropper
from monitor import Monitor
from server import Postgres
from website import Website

# Two databases that know only one way in: a session with sslmode=allow must end up with TLS in the one, and one with
# sslmode=prefer without it in the other.
HBA = """
hostnossl tls_only   all all reject
hostssl   plain_only all all reject
local     all        all     trust
host      all        all all trust
"""


def pytest_configure():
    """A run that is told to end stops its servers too, as after Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def certs(tmp_path_factory):
    return certs_module.make(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="session")
def servers(certs):
    """By major version: "15" stands for whatever Debian has."""
    with ExitStack() as stack:
        running = {name: stack.enter_context(Postgres(prefix, certs, hba=HBA))
                   for name, prefix in (("15", peers.postgres_system()), ("18", peers.postgres18()))}
        for name in ("tls_only", "plain_only"):
            subprocess.run(["psql", "--no-psqlrc", "--quiet", "--command", f"create database {name}",
                            running["15"].conninfo()], check=True)
        yield running


@pytest.fixture(scope="session")
def monitor(servers):
    with Monitor(servers["15"]) as running:
        yield running


@pytest.fixture
def eavesdropper(servers, certs):
    with Eavesdropper(servers["15"], certs) as listening:
        yield listening


@pytest.fixture(scope="session")
def website(certs):
    with Website(certs) as running:
        yield running


@pytest.fixture(scope="session")
def drivers():
    """Directory with driver-libpq18 and driver-pqcancel."""
    if not programs.LIBRARY.exists():
        pytest.exit(f"{programs.LIBRARY} is not there: build it first", returncode=2)
    return programs.build_driver()


@pytest.fixture(scope="session")
def laboratory(drivers, certs, servers):
    yield from programs.open_laboratory(drivers, certs, servers)


@pytest.fixture(scope="session")
def old(certs, servers):
    """As `laboratory`, with old_functions.c in the driver's place: for PQgetCancel, PQcancel and their like."""
    yield from programs.open_laboratory(programs.build_old_functions(), certs, servers)


@pytest.fixture(scope="session")
def locks(certs, servers):
    """As `laboratory`, with locks.c in the driver's place: signals in the middle of a lock, and handlers under watch."""
    yield from programs.open_laboratory(legacy.build("locks", "-lssl", "-lcrypto", "-rdynamic"), certs, servers)


def pytest_terminal_summary(terminalreporter):
    tally = comparison.tally
    if tally.compared:
        terminalreporter.write_line(f"{tally.compared} scenarios compared with libpq 18, {tally.wilful} of them wilful "
                                    f"differences ({len(comparison.DIFFERENCES)} kinds)")
    if matrix.cancelled:
        terminalreporter.write_line("queries cancelled, linked and preloaded, over TLS and in plaintext, by four functions:\n"
                                    + matrix.table())
