"""`make demo`: cancels one query three times, with psql, with psql under pqcancel, and with a program written for it, and
shows what an eavesdropper sees.

Starts a private PostgreSQL that accepts TLS only and an eavesdropping proxy in front of it, runs the programs through
the proxy, and judges by what was recorded. Exits 0 only if all queries were cancelled and pqcancel's requests were
unreadable.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

DEMO = Path(__file__).resolve().parent
ROOT = DEMO.parent
sys.path.insert(1, str(ROOT / "c-tests"))  # behind demo, whose own modules go first
sys.dont_write_bytecode = True

import certs  # noqa: E402
import decode  # noqa: E402
import page  # noqa: E402
import peers  # noqa: E402
from eavesdrop import Connection, Eavesdropper  # noqa: E402
from server import Postgres, conninfo  # noqa: E402

SECONDS = 20  # for anything that should take milliseconds
TLS_ONLY = "local all all trust\nhostssl all all 127.0.0.1/32 trust\nhostssl all all ::1/128 trust\n"
CANCELLED = "canceling statement due to user request"
QUERY = "select pg_sleep(60)"


class DemoError(Exception):
    """The demo could not be shown."""


@dataclass(frozen=True)
class Program:
    """What is run: psql, interrupted by Ctrl-C, or demo/cancel.c, which waits for Enter."""

    name: str
    command: list[Path | str]
    interrupted: bool = False

    def go(self, process: subprocess.Popen) -> str:
        """Makes it cancel its query; returns what it printed."""
        if self.interrupted:
            process.send_signal(signal.SIGINT)
        return process.communicate(None if self.interrupted else "\n", timeout=SECONDS)[0]


@dataclass(frozen=True)
class Cancelled:
    """One program's run: what it printed, what was recorded, and what that gives away."""

    output: str
    session: decode.Reading
    connections: list[Connection]
    reading: decode.Reading  # of the cancel connection
    pid: int

    @property
    def stopped(self) -> bool:
        return CANCELLED in self.output

    @property
    def readable(self) -> bool:
        """Whether the request is in the clear: by reading the packets, and by looking for its bytes anywhere."""
        request = decode.CANCEL_REQUEST.to_bytes(4, "big") + self.pid.to_bytes(4, "big")
        return self.reading.cancel is not None or any(request in c.sent_by("client") for c in self.connections)

    @property
    def size(self) -> int:
        """Bytes on the wire, both ways, of all connections."""
        return sum(len(chunk.data) for connection in self.connections for chunk in connection.chunks)


class Stage:
    """What the programs run on: the server, and the eavesdropper in front of it."""

    def __init__(self, postgres: Postgres, eavesdropper: Eavesdropper, ca: Path, home: Path):
        self.postgres, self.eavesdropper, self.ca, self.home = postgres, eavesdropper, ca, home
        self.psql = shutil.which("psql", path=f"{postgres.prefix / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}")
        if not self.psql:
            raise DemoError("psql is needed: apt-get install postgresql-client")
        # Nothing of the user's own may change what is shown: no PG* variables, no files in ~/.postgresql.
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "PQCANCEL_"))}
        self.environment = {**clean, "HOME": str(home), "PGGSSENCMODE": "disable", "PGCONNECT_TIMEOUT": str(SECONDS)}

    def ask(self, query: str) -> str:
        """The answer of the server itself, past the eavesdropper."""
        return subprocess.run(
            [self.psql, "-XAtqc", query, conninfo(host=self.postgres.socket_dir, port=self.postgres.port,
                                                  user=self.postgres.superuser, dbname="postgres")],
            env=self.environment, check=True, capture_output=True, text=True, timeout=SECONDS).stdout.strip()

    def run(self, program: Program) -> Cancelled:
        """Runs a program through the eavesdropper; makes it cancel when the server says that its query is running."""
        session = conninfo(host="localhost", hostaddr=self.eavesdropper.host, port=self.eavesdropper.port,
                           dbname="postgres", user=self.postgres.superuser, application_name=program.name,
                           sslmode="verify-full", sslrootcert=self.ca)
        process = subprocess.Popen([*program.command, session], env=self.environment, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            pid = self._wait_for_query(program.name, process)
            output = program.go(process)
        except subprocess.TimeoutExpired as late:
            raise DemoError(f"{program.name} did not end within {SECONDS} seconds of the cancel") from late
        finally:
            process.kill()
            process.communicate()
        connections = self.eavesdropper.take(SECONDS)
        if len(connections) != 2:
            raise DemoError(f"{program.name} failed, after {len(connections)} connections (2 expected):\n{output}")
        first, second = connections
        return Cancelled(output, decode.read(first), connections, decode.read(second, "CancelRequest"), pid)

    def _wait_for_query(self, program: str, process: subprocess.Popen) -> int:
        """The PID of the backend that runs the program's query. Asking takes psql some milliseconds: pause enough."""
        query = f"select pid from pg_stat_activity where application_name = '{program}' and wait_event = 'PgSleep'"
        deadline = time.monotonic() + SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            pid = self.ask(query)
            if pid:
                return int(pid)
        raise DemoError(f"the query of {program} was never seen running:\n" + (
            process.stdout.read() if process.poll() is not None else f"still not after {SECONDS} seconds"))


def main() -> int:
    arguments = parse_arguments()
    on_interrupt(interrupt)
    try:
        program = compile_program(arguments.build, arguments.lib)
        with ExitStack() as stack:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pqcancel-demo-")))
            made = certs.make(home / "certs")
            prefix = arguments.postgres.resolve() if arguments.postgres else peers.postgres_system()
            with interrupts_put_off():
                postgres = stack.enter_context(Postgres(prefix, made, hba=TLS_ONLY))
            eavesdropper = stack.enter_context(Eavesdropper((postgres.host, postgres.port)))
            stack.callback(on_interrupt, signal.SIG_IGN)  # runs first: nothing interrupts the cleaning up
            return perform(Stage(postgres, eavesdropper, made.ca, home), arguments.lib.with_name("pqcancel"), program)
    except (DemoError, peers.PeerError, OSError, RuntimeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"demo: {Path(error.cmd[0]).name} failed: {error.stderr}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Shows what an eavesdropper sees of a cancelled query.")
    parser.add_argument("--lib", type=Path, help="the library (default: PQCANCEL_LIB, else target/release)",
                        default=Path(os.environ.get("PQCANCEL_LIB", ROOT / "target" / "release" / "libpqcancel.so")))
    parser.add_argument("--build", type=Path, help="where the programs are compiled", default=ROOT / "target" / "demo")
    parser.add_argument("--postgres", type=Path, help="prefix of the server to run (default: the newest installed)")
    return parser.parse_args()


def on_interrupt(handler) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def interrupt(number: int, _frame) -> None:
    """Ends the demo, once: what follows is the cleaning up."""
    on_interrupt(signal.SIG_IGN)
    raise KeyboardInterrupt(number)


@contextmanager
def interrupts_put_off():
    """For the making of the server: initdb, when killed, leaves a child behind that goes on writing for a moment."""
    noted: list[int] = []
    on_interrupt(lambda number, _frame: noted.append(number))
    try:
        yield
    finally:
        on_interrupt(interrupt)
        if noted:
            interrupt(noted[0], None)


def compile_program(build: Path, lib: Path) -> Path:
    """Compiles demo/cancel.c into build, and puts the library next to it under the names that linkers look for."""
    if not lib.exists():
        raise DemoError(f"{lib} is not there: run make first")
    build.mkdir(parents=True, exist_ok=True)
    for name in ("libpqcancel.so", "libpqcancel.so.1"):
        (build / name).unlink(missing_ok=True)
        (build / name).symlink_to(lib.resolve())
    compiler = [*shlex.split(os.environ.get("CC", "cc")), "-std=c11", "-Wall", "-Wextra", "-Werror", "-O2"]
    libpq = {what: shlex.split(output("pkg-config", f"--{what}", "libpq")) for what in ("cflags", "libs")}
    output(*compiler, f"-I{ROOT / 'include'}", *libpq["cflags"], "-o", build / "cancel", DEMO / "cancel.c",
           f"-L{build}", "-lpqcancel", *libpq["libs"], "-Wl,-rpath,$ORIGIN")
    return build / "cancel"


def output(*command) -> str:
    try:
        return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as missing:
        raise DemoError(f"{command[0]} is needed: {missing}") from missing


def perform(stage: Stage, wrapper: Path, program: Path) -> int:
    page.show(page.coloured("pqcancel demo: one query, cancelled three times, while an eavesdropper listens", page.BOLD))
    page.paragraph(f"PostgreSQL {stage.ask('show server_version')} accepts nothing but TLS (hostssl). The programs, over "
                   f"libpq {output('pkg-config', '--modversion', 'libpq').strip()}, connect with sslmode=verify-full. "
                   "Between them a proxy passes every byte on and keeps a copy.")
    psql = [stage.psql, "-X", "-c", QUERY]

    page.heading(f"1. psql -c '{QUERY}', and Ctrl-C")
    plain = stage.run(Program("psql", psql, interrupted=True))
    report(plain)
    page.heading(f"2. pqcancel psql -c '{QUERY}', and Ctrl-C")
    preloaded = stage.run(Program("pqcancel psql", [wrapper, *psql], interrupted=True))
    report(preloaded)
    page.heading("3. A program of its own, which cancels from its event loop (demo/cancel.c)")
    linked = stage.run(Program("demo/cancel.c", [program]))
    report(linked)

    page.heading("The bytes on the wire that carry the cancel request")
    page.show()
    page.columns("psql", plain.reading, "pqcancel psql", preloaded.reading)
    page.show()
    return judge(plain, {"pqcancel psql": preloaded, "demo/cancel.c": linked})


def report(run: Cancelled) -> None:
    page.quoted(run.output)
    page.show(f"{page.MARGIN}The session runs over {run.session.version or 'plaintext'}"
              f"{f' ({run.session.cipher})' if run.session.cipher else ''}. Its cancel connection, as recorded:")
    page.time_line(run.connections[-1], run.reading)


def judge(plain: Cancelled, ours: dict[str, Cancelled]) -> int:
    """Says what was found, and returns 0 if pqcancel did what it promises."""
    faults = [f"{name} did not cancel the query" for name, run in {"psql": plain, **ours}.items() if not run.stopped]
    for name, run in ours.items():
        if not run.session.version:
            faults.append(f"the session of {name} did not run over TLS")
        if run.readable:
            faults.append(f"the cancel request of {name} is readable on the wire")
        elif not (run.reading.version and run.reading.sealed):
            faults.append(f"the cancel request of {name} was not seen inside TLS")
    if plain.reading.cancel:
        page.paragraph(f"psql sent PID {plain.reading.cancel.pid} and cancel key {plain.reading.cancel.key.hex()} of a "
                       f"{plain.session.version} session in plaintext: whoever reads them can cancel that session's "
                       "queries for as long as it lives.", colour=page.RED)
    else:
        page.paragraph("psql did not send a readable cancel request here.")
    if faults:
        page.paragraph(f"FAILED: {'; '.join(faults)}.", colour=page.RED)
        return 1
    size, reading = sum(run.size for run in ours.values()), ours["pqcancel psql"].reading
    page.paragraph(f"pqcancel sent them over {reading.version} ({reading.cipher}): no cancel request is readable in any of "
                   f"the {size} bytes of its connections. All three queries ended at once: {CANCELLED}.", colour=page.GREEN)
    return 0


if __name__ == "__main__":
    sys.exit(main())
