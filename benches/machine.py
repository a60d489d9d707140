"""What was measured, on what, and whether it was quiet meanwhile."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path

import peers
from sides import BenchError, Sides, compiler, openssl_in, run

QUIET = 0.10  # of the processors' time


def describe(sides: Sides, library: Path, conninfo: str) -> list[tuple[str, str]]:
    description = [
        ("machine", f"{processor()}, {os.cpu_count()} processors, {memory()}"),
        ("system", f"Linux {platform.release()}, {platform.freedesktop_os_release()['PRETTY_NAME']}"),
        ("compilers", f"{first_line([*compiler(), '--version'])}; pqcancel: {rustc(library)}"),
    ]
    for side in (sides.libpq, *sides.others):
        (bound,), (libpq,), (version,) = side.measure(conninfo, "libraries")
        if bound != libpq:
            raise BenchError(f"{side.name} calls PQcancelCreate of {bound}")
        description.append((side.name, f"libpq {release(version)}, {side.openssl}"))
    (bound,), _, (version,) = sides.ours.measure(conninfo, "libraries")
    if Path(bound).resolve() != library.resolve():
        raise BenchError(f"{sides.ours.name} calls PQcancelCreate of {bound}")
    description.append((sides.ours.name, f"{openssl_in(library)} inside, over libpq {release(version)}"))
    return description


def release(version: str) -> str:
    return f"{int(version) // 10000}.{int(version) % 10000}"


def processor() -> str:
    found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def memory() -> str:
    kibibytes = int(re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE).group(1))
    return f"{kibibytes / 2**20:.0f} GiB"


def first_line(command: list[str]) -> str:
    return run(command).splitlines()[0]


def rustc(library: Path) -> str:
    found = re.search(rb"rustc version \d+\.\d+\.\d+", library.read_bytes())
    return found.group(0).decode().replace(" version", "") if found else "rustc"


def server_version(server) -> str:
    return first_line([server.prefix / "bin" / "postgres", "--version"])


def pgbench_version() -> str:
    return first_line([peers.postgres_system() / "bin" / "pgbench", "--version"])


class Quiet:
    """How busy the machine was while nothing of ours ran: looked at before and after."""

    def __init__(self):
        self.busy: list[float] = []

    def look(self, seconds: float = 1.0) -> None:
        before = self._times()
        time.sleep(seconds)  # this is the measurement: nobody else is to be busy meanwhile
        after = self._times()
        spent = [late - early for early, late in zip(before, after)]
        idle = spent[3] + spent[4]
        self.busy.append(1 - idle / max(sum(spent), 1))

    def _times(self) -> list[int]:
        """user, nice, system, idle, iowait, irq, softirq, steal, of all processors."""
        return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]

    def verdict(self) -> str:
        shares = " and ".join(f"{busy:.0%}" for busy in self.busy)
        load = f"load average at the end {os.getloadavg()[0]:.1f}, the run's own included"
        if max(self.busy) > QUIET:
            return f"The machine was NOT QUIET: {shares} of its processors' time taken by others, before and after; {load}."
        return f"The machine was quiet: {shares} of its processors' time taken by others, before and after; {load}."
