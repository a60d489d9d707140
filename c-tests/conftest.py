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
from kerberos import Realm
from machine_copy import CannotCopy, MachineCopy
from monitor import Monitor
from server import Postgres
from website import Website

# The monitor comes over the Unix socket; everybody else shows a ticket, and no session is in the clear.
HBA_OF_REALM = """
local      all all trust
hostgssenc all all 127.0.0.1/32 gss include_realm=0
hostssl    all all 127.0.0.1/32 gss include_realm=0
"""
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


@pytest.fixture
def machine(tmp_path_factory):
    """A copy of this machine, with the checkout and the tests' own files as they are."""
    shared = {peers.ROOT, programs.LIBRARY.parent, tmp_path_factory.getbasetemp()}
    try:
        with MachineCopy(tmp_path_factory.mktemp("copy"), *shared) as copy:
            yield copy
    except CannotCopy as reason:
        pytest.skip(f"this machine cannot be copied: {reason}")


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
def realm():
    with Realm() as running:
        yield running


@pytest.fixture(scope="session")
def expired_tickets(realm, tmp_path_factory):
    """A file of them."""
    file = tmp_path_factory.mktemp("tickets") / "expired"
    realm.expire(file)
    return file


@pytest.fixture(scope="session")
def gss_servers(realm, certs):
    """As `servers`, with one that wants tickets, for the transport "gss"."""
    with Postgres(peers.postgres_system(), certs, settings={"krb_server_keyfile": str(realm.keytab)}, hba=HBA_OF_REALM,
                  environment=realm.server_environment, client_environment=realm.environment) as running:
        yield {"gss": running}


@pytest.fixture
def acceptor(realm, monkeypatch):
    """Lets scripts play a server that the realm's users accept (gssapi.py)."""
    for name, value in realm.acceptor_environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def gss(drivers, certs, gss_servers):
    """As `laboratory`, for sessions that are encrypted with GSSAPI."""
    yield from programs.open_laboratory(drivers, certs, gss_servers)


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
