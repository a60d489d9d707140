"""Servers with the library preloaded: what postgres_fdw and dblink run on a remote server is cancelled there, as protected as
their session is. The backends work on afterwards and end as they should, and so does the server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import peers
from certs import Certs
from eavesdropper import Cancels
from library import LIBRARY
from monitor import DEADLINE, SLEEPING, Monitor, wait_until
from preloaded import BIN, TLS, WITHOUT, Way, each_way
from server import Postgres
from wire import is_retried

# 15 stands for whatever Debian has.
VERSIONS = [15, 17, 18]
# From this version on postgres_fdw and dblink call the new functions; before, the old ones, which need the courier.
WITH_NEW_FUNCTIONS = 17

CANCELLED = ["ERROR:  57014"]
FAST_SHUTDOWN, SMART_SHUTDOWN = signal.SIGINT, signal.SIGTERM
TROUBLE = re.compile(r"PANIC|WARNING|terminated by signal|multithreaded|ld\.so")

each_version = pytest.mark.parametrize("version", VERSIONS)


class Session(Monitor):
    """One on the local server. A statement that fails answers with its SQLSTATE, and the session goes on."""

    def __init__(self, server: Postgres):
        super().__init__(server)
        # Debian's psql, because the other servers come without one.
        _, *options, conninfo = self.command
        self.command = [BIN / "psql", *options, "--set=ON_ERROR_STOP=0", "--set=VERBOSITY=sqlstate", conninfo]

    def __enter__(self) -> "Session":
        super().__enter__()
        self.worker = ThreadPoolExecutor(1)
        self.pid = int(self.ask("select pg_backend_pid()")[0])
        return self

    def __exit__(self, *exception) -> None:
        if exception[0]:  # its query may never end
            self.process.kill()
        super().__exit__(*exception)
        self.worker.shutdown()

    def begin(self, *statements: str) -> Future:
        """Asks, and does not wait for the answer."""
        return self.worker.submit(self.ask, *statements)


class Local:
    """A server whose sessions are clients of the remote one."""

    def __init__(self, server: Postgres, ca: Path):
        self.server, self.ca = server, ca
        self.has_new_functions = int((server.data / "PG_VERSION").read_text()) >= WITH_NEW_FUNCTIONS
        self.postmaster = int((server.data / "postmaster.pid").read_text().splitlines()[0])

    @contextmanager
    def session(self):
        """In a database as new, and with nothing in the log afterwards that should not be there."""
        with Session(self.server) as running:
            running.ask("set client_min_messages = error", "drop extension if exists postgres_fdw, dblink cascade",
                        "create extension postgres_fdw", "create extension dblink")
            yield running
        wait_until(lambda: not Path(f"/proc/{running.pid}").exists())
        assert not TROUBLE.search(self.log), self.log

    def import_remote(self, session: Session, eavesdropper, way: Way, server: str = "remote") -> None:
        """Makes a schema of the server's name, with foreign tables for what is in the schema `remote` over there."""
        options = {**eavesdropper.place, "sslrootcert": self.ca, "sslmode": way.sslmode, "dbname": "postgres",
                   "application_name": eavesdropper.name, "async_capable": "true"}
        if self.has_new_functions:
            options["parallel_abort"] = "true"
        listed = ", ".join(f"{option} '{value}'" for option, value in options.items())
        assert session.ask(f"create server {server} foreign data wrapper postgres_fdw options ({listed})",
                           f"create user mapping for postgres server {server} options (user 'postgres')",
                           f"create schema if not exists {server}",
                           f"import foreign schema remote from server {server} into {server}") == []

    def conninfo(self, eavesdropper, way: Way) -> str:
        """For dblink."""
        return eavesdropper.conninfo(sslmode=way.sslmode, sslrootcert=self.ca)

    def administer(self, function: str, session: Session) -> None:
        """Does to a session what a superuser can do from another one."""
        with Session(self.server) as superuser:
            assert superuser.ask(f"select {function}({session.pid})") == ["t"]

    def encrypts(self, way: Way) -> bool:
        """Are its cancels encrypted? libpq's own new functions do it, too."""
        return not way.readable or way.sslmode != "disable" and self.has_new_functions

    @property
    def log(self) -> str:
        return self.server.log.read_text()

    def is_down(self) -> bool:
        return "database system is shut down" in self.log


def threads(pid: int) -> list[str]:
    """Their names."""
    return sorted(name.read_text().strip() for name in Path(f"/proc/{pid}/task").glob("*/comm"))


def has_library(pid: int) -> bool:
    return LIBRARY.name in Path(f"/proc/{pid}/maps").read_text()


@pytest.fixture(scope="module")
def readable(certs):
    """Directory with what the server's user has to read: the library, and the CA's certificate."""
    with tempfile.TemporaryDirectory(prefix="pqcancel-preload-") as name:
        for file in (LIBRARY, certs.ca):
            shutil.copy(file, name)
        os.chmod(name, 0o755)
        yield Path(name)


@contextmanager
def started(version: int, certs: Certs, readable: Path, preloaded: bool = True):
    prefix = peers.postgres_system() if version == 15 else peers.postgres(version)
    preload = {"LD_PRELOAD": str(readable / LIBRARY.name)} if preloaded else {}
    with Postgres(prefix, certs, environment={"HOME": os.devnull, **preload}) as server:
        yield Local(server, readable / certs.ca.name)


@pytest.fixture(scope="module")
def local(certs, readable):
    """A server of this version, with the library or without."""
    running: dict[tuple[int, bool], Local] = {}
    with ExitStack() as stack:
        def find(version: int, preloaded: bool = True) -> Local:
            key = version, preloaded
            if key not in running:
                running[key] = stack.enter_context(started(version, certs, readable, preloaded))
            return running[key]
        yield find


@pytest.fixture(scope="module")
def remote(monitor):
    """The monitor of the remote server, where a view that sleeps is, and one that tells whose session looks at it."""
    monitor.ask("create schema remote", "create view remote.slow as select 1 as number from pg_sleep(600)",
                "create view remote.place as select pg_backend_pid() as pid")
    yield monitor
    # What a test that failed has left behind holds locks.
    monitor.ask(f"select pg_terminate_backend(pid) from pg_stat_activity where {SLEEPING}", "drop schema remote cascade")


def wire_shows(eavesdropper, local: Local, way: Way, cancels: int, repeated: bool = True) -> None:
    """So many cancels; those that pqcancel encrypts take a round trip less than libpq's. postgres_fdw, where it calls the new
    functions, repeats a cancel whose query has not ended a second later."""
    encrypts = local.encrypts(way)
    seen = eavesdropper.cancels
    if repeated and local.has_new_functions:
        cancels = max(cancels, sum(seen))
    assert seen == (Cancels(0, cancels) if encrypts else Cancels(cancels, 0))
    last = eavesdropper.connections[-1]
    assert is_retried(last) == (encrypts and not way.preloaded)


def cancelled(server: Local, session: Session, remote: Monitor, eavesdropper) -> None:
    """A query that runs on the remote server ends there when it is cancelled here."""
    answer = session.begin("select number from remote.slow")
    remote.wait_for(1, eavesdropper.name, SLEEPING)
    server.administer("pg_cancel_backend", session)
    assert answer.result(DEADLINE) == CANCELLED
    remote.wait_for(0, eavesdropper.name, SLEEPING)


@each_way
@each_version
def test_postgres_fdw(local, remote, eavesdropper, version, way):
    """More than once; and the remote session goes on for the next query."""
    server = local(version, way.preloaded)
    with server.session() as session:
        assert has_library(session.pid) == way.preloaded
        server.import_remote(session, eavesdropper, way)
        place = session.ask("select pid from remote.place")
        assert threads(session.pid) == ["postgres"]
        for _ in range(2):
            cancelled(server, session, remote, eavesdropper)
            assert session.ask("select pid from remote.place") == place
        needs_courier = way == TLS and not server.has_new_functions
        assert threads(session.pid) == ["postgres", *(["pqcancel"] if needs_courier else [])]
        assert threads(server.postmaster) == ["postgres"]
        # A fork of the backend, and what it executes.
        assert session.ask("copy (select 42) to program 'grep --quiet 42'") == []
    wire_shows(eavesdropper, server, way, 2)


@each_version
def test_statement_timeout(local, remote, eavesdropper, version):
    server = local(version)
    with server.session() as session:
        server.import_remote(session, eavesdropper, TLS)
        place = session.ask("select pid from remote.place")
        assert session.ask("set statement_timeout = '5s'", "select number from remote.slow", "reset all") == CANCELLED
        remote.wait_for(0, eavesdropper.name, SLEEPING)
        assert session.ask("select pid from remote.place") == place
    wire_shows(eavesdropper, server, TLS, 1)


@each_way
@each_version
def test_backend_terminated(local, remote, eavesdropper, version, way):
    """The cancel is sent on the backend's way out."""
    server = local(version, way.preloaded)
    with server.session() as session:
        server.import_remote(session, eavesdropper, way)
        answer = session.begin("select number from remote.slow")
        remote.wait_for(1, eavesdropper.name, SLEEPING)
        server.administer("pg_terminate_backend", session)
        with pytest.raises(RuntimeError, match="57P01"):
            answer.result(DEADLINE)
    remote.wait_for(0, eavesdropper.name)
    wire_shows(eavesdropper, server, way, 1)


@each_way
@each_version
def test_two_remote_queries_at_once(local, remote, eavesdropper, version, way):
    """With the new functions both cancels are under way at the same time."""
    server = local(version, way.preloaded)
    with server.session() as session:
        for name in ("remote", "another"):
            server.import_remote(session, eavesdropper, way, name)
        answer = session.begin("select number from remote.slow union all select number from another.slow")
        remote.wait_for(2, eavesdropper.name, SLEEPING)
        server.administer("pg_cancel_backend", session)
        assert answer.result(DEADLINE) == CANCELLED
        remote.wait_for(0, eavesdropper.name, SLEEPING)
        assert len(session.ask("select pid from remote.place union all select pid from another.place")) == 2
    wire_shows(eavesdropper, server, way, 2)


@each_way
@each_version
def test_dblink_cancel_query(local, remote, eavesdropper, version, way):
    server = local(version, way.preloaded)
    with server.session() as session:
        assert session.ask(f"select dblink_connect('remote', $${server.conninfo(eavesdropper, way)}$$)") == ["OK"]
        for _ in range(2):
            assert session.ask("select dblink_send_query('remote', 'select number from remote.slow')") == ["1"]
            remote.wait_for(1, eavesdropper.name, SLEEPING)
            assert session.ask("select dblink_cancel_query('remote')") == ["OK"]
            remote.wait_for(0, eavesdropper.name, SLEEPING)
            assert session.ask("select number from dblink_get_result('remote') as (number int)") == CANCELLED
            assert session.ask("select number from dblink_get_result('remote') as (number int)") == []
        assert session.ask("select answer from dblink('remote', 'select 42') as (answer int)") == ["42"]
    wire_shows(eavesdropper, server, way, 2, repeated=False)


@pytest.mark.parametrize("way", [TLS, WITHOUT], ids=["tls", "tls-without-pqcancel"])
@each_version
def test_dblink_cancels_nothing_by_itself(local, remote, eavesdropper, version, way):
    """In no version: a backend inside dblink() hears of the interruption when the remote query has ended."""
    server = local(version, way.preloaded)
    with server.session() as session:
        answer = session.begin(f"select number from dblink($${server.conninfo(eavesdropper, way)}$$, "
                               "'select number from remote.slow') as (number int)")
        remote.wait_for(1, eavesdropper.name, SLEEPING)
        server.administer("pg_cancel_backend", session)
        assert not answer.done()
        remote.cancel(eavesdropper.name)
        assert answer.result(DEADLINE) == CANCELLED
    assert eavesdropper.cancels == Cancels(0, 0)


@each_way
@each_version
def test_fast_shutdown(certs, readable, remote, eavesdropper, version, way):
    """One session has cancelled and is idle, and one is in the middle of a remote query, which ends, too."""
    with started(version, certs, readable, way.preloaded) as server:
        with server.session() as idle, Session(server.server) as busy:
            server.import_remote(idle, eavesdropper, way)
            cancelled(server, idle, remote, eavesdropper)
            answer = busy.begin("select number from remote.slow")
            remote.wait_for(1, eavesdropper.name, SLEEPING)
            os.kill(server.postmaster, FAST_SHUTDOWN)
            with pytest.raises(RuntimeError, match="57P01"):
                answer.result(DEADLINE)
            wait_until(server.is_down, seen=lambda: server.log)
        remote.wait_for(0, eavesdropper.name)
        wire_shows(eavesdropper, server, way, 2)


@each_version
def test_smart_shutdown(certs, readable, remote, eavesdropper, version):
    """The server waits for a session that has cancelled, and for nothing else when that has ended."""
    with started(version, certs, readable) as server:
        with server.session() as session:
            server.import_remote(session, eavesdropper, TLS)
            cancelled(server, session, remote, eavesdropper)
            os.kill(server.postmaster, SMART_SHUTDOWN)
            wait_until(lambda: "received smart shutdown request" in server.log)
            assert session.ask("select pid from remote.place") and not server.is_down()
        wait_until(server.is_down, seen=lambda: server.log)
