"""What the preload costs programs that cancel nothing: pgbench over TLS, and the start of small ones."""

from __future__ import annotations

import os
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import peers
from figures import LIBPQ, PQCANCEL, Figures
from sides import BenchError, run

CLIENTS = 2


@dataclass(frozen=True)
class Amount:
    pgbench_rounds: int
    pgbench_seconds: int
    starts: int
    memory_rounds: int


FULL = Amount(pgbench_rounds=8, pgbench_seconds=2, starts=400, memory_rounds=9)
QUICK = Amount(pgbench_rounds=1, pgbench_seconds=1, starts=20, memory_rounds=3)


@dataclass(frozen=True)
class Ended:
    output: str
    wall: float
    processor: float  # both in seconds


def environment(library: Path | None) -> dict[str, str]:
    return {"HOME": os.devnull, "LC_ALL": "C", "PATH": os.defpath, **({"LD_PRELOAD": str(library)} if library else {})}


def both(library: Path, round_: int) -> list[tuple[str, dict[str, str]]]:
    """Without and with the preload; in the other order every other time, so that a drift of the machine harms both alike."""
    order = [(LIBPQ, environment(None)), (PQCANCEL, environment(library))]
    return order if round_ % 2 == 0 else order[::-1]


def measure_pgbench(figures: Figures, library: Path, conninfo: str, amount: Amount) -> None:
    """Simple selects. Beside the throughput, what does not depend on the server: the client's processor time for each."""
    pgbench = peers.postgres_system() / "bin" / "pgbench"
    run([pgbench, "--initialize", "--quiet", "--scale=1", conninfo], environment(None))
    command = [pgbench, "--no-vacuum", "--select-only", f"--client={CLIENTS}", f"--time={amount.pgbench_seconds}", conninfo]
    for round_ in range(amount.pgbench_rounds):
        for side, variables in both(library, round_):
            ended = spawn(command, variables, keep_output=True)
            rate = re.search(r"^tps = ([\d.]+)", ended.output, re.MULTILINE)
            transactions = re.search(r"^number of transactions actually processed: (\d+)", ended.output, re.MULTILINE)
            if not rate or not transactions:
                raise BenchError(f"pgbench says:\n{ended.output}")
            figures.add("pgbench", "throughput", "/s", side, float(rate.group(1)))
            figures.add("pgbench", "wall", "s", side, 1 / float(rate.group(1)))
            figures.add("pgbench", "processor", "s", side, ended.processor / int(transactions.group(1)))


def measure_starts(figures: Figures, library: Path, amount: Amount) -> None:
    psql = peers.postgres_system() / "bin" / "psql"
    for name, command in (("start of /bin/true", ["/bin/true"]), ("start of psql --version", [psql, "--version"])):
        for round_ in range(amount.starts):
            for side, variables in both(library, round_):
                ended = spawn(command, variables)
                figures.add(name, "wall", "s", side, ended.wall)
                figures.add(name, "processor", "s", side, ended.processor)


def measure_memory(figures: Figures, library: Path, amount: Amount) -> None:
    """cat looks at itself. Private is what it shares with no file and nobody else, relocated pages of libraries among it."""
    command = ["/bin/cat", "/proc/self/status", "/proc/self/smaps_rollup"]
    for round_ in range(amount.memory_rounds):
        for side, variables in both(library, round_):
            output = spawn(command, variables, keep_output=True).output
            for field, quantity in (("VmHWM", "resident"), ("Anonymous", "private")):
                kibibytes = re.search(rf"^{field}:\s+(\d+) kB", output, re.MULTILINE)
                if not kibibytes:
                    raise BenchError(f"no {field} in:\n{output}")
                figures.add("memory of /bin/cat", quantity, "bytes", side, int(kibibytes.group(1)) * 1024)


def spawn(command: list, variables: dict[str, str], keep_output: bool = False) -> Ended:
    """By posix_spawn: a fork of this interpreter would take longer than what is measured."""
    arguments = list(map(str, command))
    with tempfile.TemporaryFile() if keep_output else open(os.devnull, "wb") as output:
        redirections = [(os.POSIX_SPAWN_DUP2, output.fileno(), 1), (os.POSIX_SPAWN_DUP2, output.fileno(), 2)]
        began = time.monotonic()
        pid = os.posix_spawn(arguments[0], arguments, variables, file_actions=redirections)
        _, status, usage = os.wait4(pid, 0)
        wall = time.monotonic() - began
        text = ""
        if keep_output:
            output.seek(0)
            text = output.read().decode(errors="replace")
    if os.waitstatus_to_exitcode(status) != 0:
        raise BenchError(f"{' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}:\n{text}")
    return Ended(text, wall, usage.ru_utime + usage.ru_stime)
