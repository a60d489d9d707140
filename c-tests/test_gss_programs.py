"""Programs that nobody rebuilds, in sessions that are encrypted with GSSAPI: psql in a terminal and Ctrl-C, and one Python
process with three libpqs, each of which has a GSSAPI library of its own."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path

import pytest

import bindings
import gss_scripts
import wire
from eavesdropper import Cancels, Eavesdropper
from monitor import Monitor
from preloaded import BIN, TLS, WITHOUT, WRAPPER, Way
from programs import always_closed
from scripts import close, hold
from terminal import CTRL_C, Terminal
from test_one_process import FILES, THREE, Python
from test_psql import BY_WRAPPER, PROMPT, SENT, WORK, assert_cancelled, begin, leave, try_in_vain

# The libraries that the three libpqs bring along: a wheel's bear a digest in their names, and no two are the same file.
GSSAPI = re.compile(r"libgssapi_krb5\S*\.so\.2\S*")
SEALED = "GSSENCRequest, token, packet of 76 bytes"
LOOKED_UP = ""  # the version of a symbol that dlsym() looked for; libpq's own references have one


@pytest.fixture(scope="module")
def gss_server(gss_servers):
    return gss_servers["gss"]


@pytest.fixture(scope="module")
def monitor(gss_server):
    with Monitor(gss_server, host=gss_server.socket_dir) as running:
        yield running


@pytest.fixture
def eavesdropper(gss_server, certs):
    with Eavesdropper(gss_server, certs) as listening:
        yield listening


def cancels_of(eavesdropper: Eavesdropper, sessions: int = 1) -> list[str]:
    """What the connections have sent that came after the sessions'."""
    return [wire.summary(connection) for connection in eavesdropper.connections[sessions:]]


@contextmanager
def psql(eavesdropper, home, way=TLS, command=(BIN / "psql",), **environment):
    """At its first prompt, in an encrypted session."""
    options = {"sslmode": "disable", "sslrootcert": None, "gssencmode": environment.pop("gssencmode", "require")}
    words = [*command, "--no-psqlrc", "--set=VERBOSITY=verbose", eavesdropper.conninfo(**options)]
    environment = way.environment(home, **{**eavesdropper.server.client_environment, **environment})
    with Terminal(words, environment, directory=home) as terminal:
        terminal.expect("GSSAPI-encrypted connection\n")
        terminal.expect(PROMPT)
        yield terminal


@pytest.mark.parametrize("command,way", [((BIN / "psql",), TLS), ((WRAPPER, "psql"), BY_WRAPPER), ((BIN / "psql",), WITHOUT)],
                         ids=["preloaded", "pqcancel psql", "without-pqcancel"])
def test_ctrl_c(monitor, eavesdropper, tmp_path, command, way):
    """Twice in a row, and the session works on. Without pqcancel, which is the control, whoever listens can read both."""
    with psql(eavesdropper, tmp_path, way, command) as terminal:
        for _ in range(2):
            begin(terminal, monitor, eavesdropper, WORK["pg_sleep"])
            terminal.press(CTRL_C)
            terminal.expect(SENT)
            assert_cancelled(terminal)
        leave(terminal)
    assert "Could not send" not in terminal.output
    assert eavesdropper.cancels == way.shows(2)
    assert way is WITHOUT or cancels_of(eavesdropper) == 2 * [SEALED]


# What the server does, what PQcancel says, and how many seconds it may take.
HOSTILE = {
    "refuses": (gss_scripts.refuse_but_serve(b"N"), "server doesn't support GSSAPI encryption, but it was required", "60"),
    "never-answers": (gss_scripts.after_gssenc_request(hold), "timeout expired", "1"),
    "closes": (gss_scripts.after_gssenc_request(close), "server closed the connection unexpectedly", "60"),
}


@pytest.mark.parametrize("script,message,seconds", HOSTILE.values(), ids=HOSTILE)
def test_a_server_that_takes_no_encrypted_cancel_gets_none(gss_server, certs, monitor, tmp_path, script, message, seconds):
    with Eavesdropper(gss_server, certs, always_closed(script)) as eavesdropper:
        with psql(eavesdropper, tmp_path, PQCANCEL_TIMEOUT=seconds, gssencmode="prefer") as terminal:
            try_in_vain(terminal, monitor, eavesdropper, message)
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=0)


# Three libpqs in one process.

@pytest.fixture
def python(monitor, eavesdropper, tmp_path):
    def at_work(way: Way, **more: str):
        return Python.at_work(way, eavesdropper.conninfo(sslmode="disable", sslrootcert=None, gssencmode="require"), tmp_path,
                              monitor, eavesdropper, **{**eavesdropper.server.client_environment, **more})
    return at_work


def libraries_of(name: str, directory: Path) -> set[str]:
    """The GSSAPI libraries in which pqcancel has looked for functions on behalf of this libpq."""
    return {b.owner for b in bindings.told(directory)
            if FILES[name].fullmatch(b.user) and GSSAPI.fullmatch(b.owner) and b.version == LOOKED_UP}


@pytest.mark.parametrize("cache", ["file", "memory"])
def test_each_libpq_by_its_own_gssapi_library(realm, eavesdropper, python, tmp_path, cache):
    """By the old functions, and by the new ones where the driver has them. Tickets are in a file, or in the memory of the
    process, where each library finds its own only."""
    loader = tmp_path / "loader"
    memory = {"KRB5CCNAME": "MEMORY:", "KRB5_CLIENT_KTNAME": str(realm.user_keytab)} if cache == "memory" else {}
    with python(TLS, **bindings.told_to(loader), **memory) as program:
        for name in THREE:
            program.open(name)
        program.query(*THREE)
        for name in THREE:
            program.cancel(name)
        program.query(*THREE)
        for name in reversed(THREE):
            program.cancel(name, "cancel" if name == "psycopg2" else "cancel_safe")
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=6)
    assert cancels_of(eavesdropper, sessions=3) == 6 * [SEALED]
    libraries = [libraries_of(name, loader) for name in THREE]
    assert [len(found) for found in libraries] == [1, 1, 1] and len(set.union(*libraries)) == 3, libraries
    assert bindings.trespasses(bindings.told(loader)) == set()


def test_without_pqcancel(eavesdropper, python):
    """The control experiment: the same cancels are readable."""
    with python(WITHOUT) as program:
        for name in THREE:
            program.open(name)
        program.query(*THREE)
        for name in THREE:
            program.cancel(name)
    assert eavesdropper.cancels == Cancels(readable=3, encrypted=0)
