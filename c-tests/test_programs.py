"""pg_dump, pg_restore, pgbench and vacuumdb interrupted at the terminal: their cancels go over TLS, and nothing stays behind.

Each is in the middle of something that would never end by itself, and each test is its own control experiment: without
pqcancel the same cancels are readable.
"""

from __future__ import annotations

import signal
import subprocess
from contextlib import contextmanager

import pytest

from monitor import SLEEPING, Monitor, wait_until
from preloaded import BIN, each_way
from terminal import CTRL_C, Terminal

TABLES = ("one", "two", "three", "four", "five")
BLOCKED = "wait_event_type = 'Lock'"
BUSY = "state = 'active'"
SOON = 10  # seconds: PQcancel takes no longer
INTERRUPTED = -signal.SIGINT


@pytest.fixture
def database(servers, monitor):
    """Its owner's session. A database of its own, because what blocks a program may block other tests too."""
    monitor.ask("create database interrupted")
    try:
        with Monitor(servers["15"], "interrupted") as owner:
            yield owner
    finally:
        monitor.ask("drop database interrupted with (force)")


@pytest.fixture
def holder(servers, database):
    """Another session, for locks: they end with it, before the database."""
    with Monitor(servers["15"], "interrupted") as running:
        yield running


def fill(database) -> None:
    for table in TABLES:
        database.ask(f"create table {table} as select generate_series(1, 10) as number")


def lock(holder) -> None:
    holder.ask("begin", f"lock table {', '.join(TABLES)} in access exclusive mode")


@contextmanager
def running(eavesdropper, way, home, *words, **options):
    """A program at work over the eavesdropper. Its conninfo goes where the words say CONNINFO."""
    conninfo = eavesdropper.conninfo(sslmode=way.sslmode, dbname="interrupted", **options)
    command = [BIN / words[0], *(conninfo if word == "CONNINFO" else word for word in words[1:])]
    with Terminal(command, way.environment(home), directory=home) as terminal:
        yield terminal


def interrupt(terminal, monitor, eavesdropper) -> int:
    """Ctrl-C: all that the program had the server do ends soon, which nothing else would end, and then the program with its
    children. Its status."""
    terminal.press(CTRL_C)
    monitor.wait_for(0, eavesdropper.name, BUSY, seconds=SOON)
    status = terminal.wait()
    wait_until(lambda: not terminal.processes(), seen=terminal.processes)
    monitor.wait_for(0, eavesdropper.name)
    return status


@pytest.fixture
def sleepy(database):
    """Tables from which this user reads only what a policy lets pass, and the policy sleeps."""
    fill(database)
    database.ask("create user sleepy")
    for table in TABLES:
        database.ask(f"grant select on {table} to sleepy", f"alter table {table} enable row level security",
                     f"create policy slow on {table} using (pg_sleep(600) is not null)")
    yield "sleepy"
    database.ask("drop owned by sleepy", "drop user sleepy")


@each_way
def test_pg_dump(monitor, eavesdropper, sleepy, tmp_path, way):
    words = ("pg_dump", "--jobs=4", "--format=directory", "--file=dump", "--enable-row-security", "--dbname", "CONNINFO")
    with running(eavesdropper, way, tmp_path, *words, user=sleepy) as terminal:
        monitor.wait_for(4, eavesdropper.name, f"query ~ '^COPY' and {SLEEPING}")
        assert len(terminal.processes()) == 5
        assert interrupt(terminal, monitor, eavesdropper) == 1
    assert "pg_dump: terminated by user" in terminal.output
    assert eavesdropper.cancels == way.shows(5)


@each_way
def test_pg_restore(servers, monitor, eavesdropper, database, holder, tmp_path, way):
    fill(database)
    subprocess.run([BIN / "pg_dump", "--format=directory", f"--file={tmp_path}/dump", "--dbname",
                    servers["15"].conninfo(dbname="interrupted")], check=True)
    lock(holder)
    words = ("pg_restore", "--jobs=4", "--data-only", "--dbname", "CONNINFO", "dump")
    with running(eavesdropper, way, tmp_path, *words) as terminal:
        monitor.wait_for(4, eavesdropper.name, f"query ~ '^COPY' and {BLOCKED}")
        assert len(terminal.processes()) == 5
        assert interrupt(terminal, monitor, eavesdropper) == 1
    assert "pg_restore: terminated by user" in terminal.output
    assert eavesdropper.cancels == way.shows(4)


@each_way
def test_vacuumdb(monitor, eavesdropper, database, holder, tmp_path, way):
    fill(database)
    lock(holder)
    words = ("vacuumdb", "--jobs=2", "--dbname", "CONNINFO", *(f"--table={table}" for table in TABLES))
    with running(eavesdropper, way, tmp_path, *words) as terminal:
        monitor.wait_for(2, eavesdropper.name, f"query ~ '^VACUUM' and {BLOCKED}")
        wait_until(terminal.is_asleep)  # it tells the handler which session to cancel only when it begins to wait
        assert interrupt(terminal, monitor, eavesdropper) == 1
    assert "Cancel request sent" in terminal.output
    # The handler cancels the first session only; then vacuumdb, on its way out, cancels whatever is still active to it.
    assert eavesdropper.cancels == way.shows(3)


@each_way
def test_pgbench_initialization(monitor, eavesdropper, database, holder, tmp_path, way):
    database.ask("create table pgbench_accounts ()")
    holder.ask("begin", "lock table pgbench_accounts in access exclusive mode")
    with running(eavesdropper, way, tmp_path, "pgbench", "--initialize", "CONNINFO") as terminal:
        monitor.wait_for(1, eavesdropper.name, BLOCKED)
        assert interrupt(terminal, monitor, eavesdropper) == 1
    assert "Cancel request sent" in terminal.output
    assert eavesdropper.cancels == way.shows(1)


@each_way
def test_pgbench_run(monitor, eavesdropper, database, tmp_path, way):
    """pgbench cancels nothing then: SIGINT ends it as it ends any program, and the server finds out in its own time."""
    (tmp_path / "sleep.sql").write_text("select pg_sleep(600);\n")
    words = ("pgbench", "--client=2", "--jobs=2", "--no-vacuum", "--file=sleep.sql", "CONNINFO")
    with running(eavesdropper, way, tmp_path, *words) as terminal:
        monitor.wait_for(2, eavesdropper.name, SLEEPING)
        terminal.press(CTRL_C)
        assert terminal.wait() == INTERRUPTED
        assert monitor.sessions(eavesdropper.name, SLEEPING) == 2
        monitor.cancel(eavesdropper.name)
        monitor.wait_for(0, eavesdropper.name)
    assert eavesdropper.cancels == way.shows(0)
