"""Clients from their own packages, on the machine's libpq: each has a query cancelled in the way that it offers.

The program of a client (in the folder clients, or drivers.py) takes a conninfo, has `select pg_sleep(600)` run, cancels it
when told to at its terminal, shows how it ended, and asks `select 6 * 7`. That it was cancelled, the server's log says.
Not here, because they have nothing that cancels: PHP's PDO, Tcl's tdbc::postgres, Lua's LuaSQL, Qt's QPSQL.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Callable

import pytest

import drivers
import programs
import wire
from eavesdropper import Cancels, Eavesdropper
from hostile import SSL_REQUEST
from monitor import SLEEPING, Monitor
from peers import postgres_system
from pooler import Pooler
from preloaded import WITHOUT, WRAPPER, Way
from programs import BUILD, SOURCES, WARNINGS, pkg_config
from server import Postgres
from terminal import CTRL_C, Terminal
from test_psql import BY_WRAPPER, SENT, WORK, assert_cancelled, begin, leave, psql

CLIENTS = SOURCES / "clients"
PYTHON = "/usr/bin/python3"  # the one that Debian's modules are for
ANSWER = r"answer:? 42\b"
LOGGED = "57014 ERROR:  canceling statement due to user request\n"
DELIVERED, NEW_FUNCTIONS_DONE = "PQcancel returned 1 after", "CONNECTION_OK"  # in a trace

IN_PLAINTEXT = Way("disable", preloaded=False, readable=True)  # by the wrapper, too
WAYS = {"tls": BY_WRAPPER, "plaintext": IN_PLAINTEXT, "tls-without-pqcancel": WITHOUT}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def pqcancel(way: Way, *options: str) -> list:
    """The command, which stands before a program's words, if it is to be there."""
    return [] if way == WITHOUT else [WRAPPER, *options]


@dataclass(frozen=True)
class Client:
    """How a client is started, and how it cancels."""

    package: str  # Debian's
    command: Callable[[str], list]  # for what conninfo answers
    shows: str = r"query: 57014\b"
    told_by: bytes = b"now\n"
    options: tuple[str, ...] = ()  # of the command pqcancel
    traced: str = DELIVERED
    conninfo: Callable[..., str] = Eavesdropper.conninfo


# Those that are made from source. Each answers what it has made.

@cache
def psycopg() -> Path:
    """Directory for PYTHONPATH, the C part compiled over the machine's libpq. pip compares what it fetches with hashes."""
    made = BUILD / "psycopg"
    if not made.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD, prefix=".staging-") as staging:
            whole = Path(staging) / "whole"
            subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
                            "--no-binary=psycopg-c", "--require-hashes", f"--requirement={CLIENTS / 'psycopg.txt'}",
                            f"--target={whole}"], check=True, env={**os.environ, "CFLAGS": "-O0 -g0"})
            whole.rename(made)
    return made


@cache
def libpqxx() -> Path:
    made = BUILD / "libpqxx"
    BUILD.mkdir(parents=True, exist_ok=True)
    subprocess.run(["c++", "-O1", "-g", *WARNINGS, CLIENTS / "libpqxx.cpp", *pkg_config("--cflags", "--libs", "libpqxx"),
                    "-pthread", "-o", made], check=True)
    return made


def in_c(name: str, *libraries: str) -> Path:
    BUILD.mkdir(parents=True, exist_ok=True)
    return programs.cc(BUILD / name, CLIENTS / f"{name}.c", *libraries)


@cache
def odbc() -> Path:
    return in_c("odbc", "-lodbc", "-pthread")


@cache
def libpq_blocking() -> Path:
    library = programs.library_directory()
    return in_c("libpq_blocking", f"-L{library}", f"-Wl,-rpath,{library}", "-lpqcancel", *pkg_config("--libs", "libpq"),
                "-Wl,--allow-shlib-undefined")


# The table.

def script(*words: str) -> Callable[[str], list]:
    """The last word but the conninfo is a file of CLIENTS."""
    return lambda conninfo: [*words[:-1], CLIENTS / words[-1], conninfo]


def ruby_pg(way: str) -> Client:
    return Client("ruby-pg", lambda conninfo: ["ruby", CLIENTS / "ruby_pg.rb", way, conninfo])


def of_python(package: str, way: Callable, implementation: str = "", *options: str) -> Client:
    """A way of drivers.py, with Debian's module."""
    return Client(package, lambda conninfo: ["env", f"PSYCOPG_IMPL={implementation}", PYTHON, "-B", drivers.__file__,
                                             way.__name__, conninfo, "1"],
                  "query raised QueryCanceled", options=options)


def of_psycopg_c(way: Callable) -> Client:
    """As of_python, with the module from source."""
    of_debian = of_python("python3-dev", way, "c")
    return Client(of_debian.package, lambda conninfo: ["env", f"PYTHONPATH={psycopg()}", *of_debian.command(conninfo)],
                  of_debian.shows)


def odbc_connection_string(eavesdropper: Eavesdropper, sslmode: str) -> str:
    """Names the driver by its file: no odbcinst.ini has to know of it. The sslmode is an option of the driver's own."""
    driver, = Path("/usr/lib").glob("*/odbc/psqlodbcw.so")
    return f"Driver={driver};SSLmode={sslmode};pqopt={{{eavesdropper.conninfo(sslmode=None)}}}"


PHP = script("php", "-n", "-d", "extension=pgsql", "pgsql.php")
PRELOADED = {
    "php-pgsql": Client("php-pgsql", PHP, r"cancel: true\b", options=("--dlopen",)),
    "DBD-Pg-asynchronous": Client("libdbd-pg-perl", script("perl", "dbd_pg_async.pl")),
    "DBD-Pg-interrupted": Client("libdbd-pg-perl", script("perl", "dbd_pg_interrupted.pl"), told_by=CTRL_C),
    "psqlodbc": Client("odbc-postgresql", lambda string: [odbc(), string], conninfo=odbc_connection_string),
    "libpqxx": Client("libpqxx-dev", lambda conninfo: [libpqxx(), conninfo]),
    "psycopg2": of_python("python3-psycopg2", drivers.psycopg2_cancel),
    "psycopg-ctypes": of_python("python3-psycopg", drivers.psycopg_cancel, "python", "--dlopen"),
    "psycopg-c": of_psycopg_c(drivers.psycopg_cancel),
    "psycopg-c-safe": of_psycopg_c(drivers.psycopg_cancel_safe),
    "pygresql": Client("python3-pygresql", script(PYTHON, "-B", "pygresql.py")),
    "pgtcl": Client("libpgtcl", script("tclsh", "pgtcl.tcl")),
    "ruby-pg-sync": ruby_pg("sync_cancel"),
}
LINKED = Client("libpq-dev", lambda conninfo: [libpq_blocking(), conninfo], traced=NEW_FUNCTIONS_DONE)
OUT_OF_REACH = {
    # Loads its extensions with RTLD_DEEPBIND: they look into their own libpq before what is preloaded.
    "php-pgsql-without-dlopen": Client("php-pgsql", PHP, r"cancel: true\b"),
    # Reads the key and sends it over a socket of its own.
    "ruby-pg-cancel": ruby_pg("cancel"),
}


@pytest.fixture(scope="module")
def server(certs):
    """Its log says whose statement ended with which SQLSTATE."""
    with Postgres(postgres_system(), certs, settings={"log_line_prefix": "%a %e "}) as running:
        yield running


@pytest.fixture(scope="module")
def monitor(server):
    with Monitor(server) as running:
        yield running


@pytest.fixture
def eavesdropper(server, certs):
    with Eavesdropper(server, certs) as listening:
        yield listening


@pytest.fixture
def cancel(server, monitor, tmp_path):
    """Has a client cancel a query and go on; answers what was traced."""
    def run(client: Client, way: Way, before: list, eavesdropper: Eavesdropper) -> str:
        needs(client.package)
        words = [*before, *client.command(client.conninfo(eavesdropper, sslmode=way.sslmode))]
        trace = tmp_path / "trace"
        trace.touch()
        earlier = logged(server, eavesdropper)
        with Terminal(words, way.environment(tmp_path, PQCANCEL_TRACE=str(trace)), directory=tmp_path) as terminal:
            monitor.wait_for(1, eavesdropper.name, SLEEPING)
            terminal.press(client.told_by)
            terminal.expect(client.shows)
            terminal.expect(ANSWER)
            assert terminal.wait() == 0
        assert logged(server, eavesdropper) == earlier + 1
        return trace.read_text()
    return run


def logged(server: Postgres, eavesdropper: Eavesdropper) -> int:
    """How often the server has cancelled one who came by this port: perhaps also for another eavesdropper, earlier."""
    return server.log.read_text().count(f"{eavesdropper.name} {LOGGED}")


def needs(package: str) -> None:
    """Skips the test where the package is not installed: not every system has every one of them."""
    status = subprocess.run(["dpkg-query", "--show", "--showformat=${Status}", package], capture_output=True, text=True).stdout
    if not status.endswith(" installed"):
        pytest.skip(f"{package} is not installed")


@each_way
@pytest.mark.parametrize("client", PRELOADED.values(), ids=PRELOADED)
def test_preloaded(eavesdropper, cancel, client, way):
    trace = cancel(client, way, pqcancel(way, *client.options), eavesdropper)
    assert (client.traced in trace) == (way != WITHOUT), trace
    assert eavesdropper.cancels == way.shows(1)


@pytest.mark.parametrize("way", [BY_WRAPPER, IN_PLAINTEXT], ids=["tls", "plaintext"])
def test_linked(eavesdropper, cancel, way):
    assert LINKED.traced in cancel(LINKED, way, [], eavesdropper)
    assert eavesdropper.cancels == way.shows(1)


@pytest.mark.parametrize("client", OUT_OF_REACH.values(), ids=OUT_OF_REACH)
def test_out_of_reach(eavesdropper, cancel, client):
    """A known limit: the cancel does not come to us, and can be read. When this fails, README has good news to tell."""
    assert DELIVERED not in cancel(client, BY_WRAPPER, pqcancel(BY_WRAPPER), eavesdropper)
    assert eavesdropper.cancels == Cancels(readable=1, encrypted=0)


# pgbouncer. It gives its clients cancel keys of its own, and keeps the server's for itself.

@pytest.fixture
def behind(server, certs):
    """Listens between pgbouncer and the server."""
    with Eavesdropper(server, certs) as listening:
        yield listening


@pytest.fixture
def before(behind, certs, way):
    """Listens between pgbouncer and its clients."""
    needs("pgbouncer")
    with Pooler(behind.place["port"], certs, tls=way.sslmode != "disable") as pooler:
        with Eavesdropper(pooler, certs) as listening:
            yield listening


def assert_passed_on(behind: Eavesdropper) -> None:
    """A known limit: pgbouncer's session on the server is over TLS, and yet it sends the cancel on in the clear."""
    session, _ = behind.connections
    clear, sealed = wire.read(session)
    assert clear == SSL_REQUEST and sealed
    assert behind.cancels == Cancels(readable=1, encrypted=0)


@each_way
def test_psql_through_pgbouncer(server, monitor, before, behind, tmp_path, way):
    earlier = logged(server, before)
    with psql(before, tmp_path, way, [*pqcancel(way), "psql"]) as terminal:
        begin(terminal, monitor, before, WORK["pg_sleep"])
        terminal.press(CTRL_C)
        terminal.expect(SENT)
        assert_cancelled(terminal)
        leave(terminal)
    assert logged(server, before) == earlier + 1
    assert before.cancels == way.shows(1)
    assert_passed_on(behind)


@pytest.mark.parametrize("way", [BY_WRAPPER, IN_PLAINTEXT], ids=["tls", "plaintext"])
def test_linked_through_pgbouncer(before, behind, cancel, way):
    assert LINKED.traced in cancel(LINKED, way, [], before)
    assert before.cancels == way.shows(1)
    assert_passed_on(behind)
