"""A session straight to the server, beside what is tested: it looks at the others, waits for them, and holds locks."""

from __future__ import annotations

import os
import subprocess
import time
from typing import Callable

from server import Postgres

DEADLINE = 120  # seconds for anything that is waited for
PAUSE = 0.01  # between two looks
SLEEPING = "wait_event = 'PgSleep'"  # a condition of a session
END = "-- end of answer --"


class Monitor:
    """psql behind a pipe, for use in a `with` statement."""

    def __init__(self, server: Postgres, database: str = "postgres", **options):
        self.command = [server.prefix / "bin" / "psql", "--no-psqlrc", "--quiet", "--no-align", "--tuples-only",
                        "--set=ON_ERROR_STOP=1", server.conninfo(dbname=database, sslmode="disable", **options)]

    def __enter__(self) -> "Monitor":
        self.process = subprocess.Popen(self.command, env={"HOME": os.devnull, "LC_ALL": "C"}, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return self

    def __exit__(self, *_exception) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def ask(self, *statements: str) -> list[str]:
        """The rows of the answers, one a line."""
        self.process.stdin.write("".join(f"{statement};\n" for statement in statements) + f"\\echo {END}\n")
        self.process.stdin.flush()
        rows: list[str] = []
        for line in self.process.stdout:
            if line.rstrip("\n") == END:
                return rows
            rows.append(line.rstrip("\n"))
        raise RuntimeError("\n".join([*statements, *rows]))  # ON_ERROR_STOP: psql has ended

    def sessions(self, name: str, condition: str) -> int:
        """How many sessions with this application_name are in the condition."""
        return int(self.ask(f"select count(*) from pg_stat_activity where application_name = '{name}' and ({condition})")[0])

    def cancel(self, name: str) -> None:
        """From inside the server, by the right of a superuser."""
        self.ask(f"select pg_cancel_backend(pid) from pg_stat_activity where application_name = '{name}'")

    def wait_for(self, count: int, name: str, condition: str = "true", seconds: float = DEADLINE) -> None:
        """Waits until so many sessions with this application_name are in the condition."""
        seen = f"select pid, state, wait_event, query from pg_stat_activity where application_name = '{name}'"
        wait_until(lambda: self.sessions(name, condition) == count, seconds, lambda: self.ask(seen))


def wait_until(met: Callable[[], bool], seconds: float = DEADLINE, seen: Callable[[], object] = lambda: "") -> None:
    """Waits for a condition; what is seen in its place goes into the error."""
    deadline = time.monotonic() + seconds
    while not met():
        if time.monotonic() > deadline:
            raise AssertionError(f"not after {seconds} seconds: {seen()}")
        time.sleep(PAUSE)
