"""What one cancel costs: each kind of session, each way to cancel; and single steps, many at once, and what is free of I/O."""

from __future__ import annotations

import re
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from certs import Certs
from figures import BARE, Figures
from server import Postgres
from sides import BenchError, Side, Sides, run

NEW_WAYS = ["blocking", "polled", "reset"]
WAYS = [*NEW_WAYS, "PQcancel"]
ONE_CA, BUNDLE, SYSTEM = "TLS, one CA", "TLS, CA bundle", "TLS, sslrootcert=system"
CLIENT_CERTIFICATE, PLAINTEXT, UNIX = "TLS, client certificate", "plaintext TCP", "Unix socket"
TRANSPORTS = (ONE_CA, CLIENT_CERTIFICATE, BUNDLE, SYSTEM, PLAINTEXT, UNIX)
AT_ONCE = "at once"
CREATE, GET = "{}: PQcancelCreate + Finish", "{}: PQgetCancel + PQfreeCancel"
NANOSECOND = 1e-9
SETTLED = 4  # seconds


@dataclass(frozen=True)
class Transport:
    """A kind of session."""

    name: str
    conninfo: str
    environment: dict[str, str] = field(default_factory=dict)
    dear: bool = False  # libpq reads the machine's CAs for each cancel

    @property
    def encrypted(self) -> bool:
        return self.name.startswith("TLS")


@dataclass(frozen=True)
class Amount:
    """How much is done. A round is one process of each side, in turn."""

    rounds: int
    cancels: int  # in a round
    dear_cancels: int
    counted: int
    first_rounds: int
    crowd: int
    crowd_rounds: int
    pairs: int
    counted_transports: tuple[str, ...] = ()  # none: all

    def of(self, transport: Transport) -> int:
        return self.dear_cancels if transport.dear else self.cancels


FULL = Amount(rounds=7, cancels=40, dear_cancels=12, counted=3, first_rounds=9, crowd=1000, crowd_rounds=3, pairs=2000)
QUICK = Amount(rounds=1, cancels=6, dear_cancels=3, counted=1, first_rounds=2, crowd=50, crowd_rounds=1, pairs=200,
               counted_transports=(ONE_CA, PLAINTEXT))


def transports(server: Postgres, made: Certs, bundle: Path) -> list[Transport]:
    tls = {"host": "localhost", "hostaddr": server.host, "sslmode": "verify-full"}
    client = {"sslcert": made.client.cert, "sslkey": made.client.key}
    return [
        Transport(ONE_CA, server.conninfo(**tls, sslrootcert=made.ca)),
        Transport(CLIENT_CERTIFICATE, server.conninfo(**tls, sslrootcert=made.ca, **client)),
        Transport(BUNDLE, server.conninfo(**tls, sslrootcert=bundle), dear=True),
        Transport(SYSTEM, server.conninfo(**tls, sslrootcert="system"),
                  {"SSL_CERT_FILE": str(bundle), "SSL_CERT_DIR": str(bundle.parent / "none")}, dear=True),
        Transport(PLAINTEXT, server.conninfo(sslmode="disable")),
        Transport(UNIX, server.conninfo(host=server.socket_dir)),
    ]


def subject(transport: Transport, way: str) -> str:
    return f"{transport.name}: {way}"


def measure_times(figures: Figures, sides: Sides, all_transports: list[Transport], amount: Amount) -> None:
    """In alternation, a process for each. A round's wall time is the median of its cancels, its processor time their mean."""
    for round_ in range(amount.rounds):
        for transport in all_transports:
            for way in WAYS:
                order = sides.all if way in NEW_WAYS and transport.name in (ONE_CA, BUNDLE) else sides.both
                for side in order if round_ % 2 == 0 else reversed(order):
                    _time(figures, side.name, side, transport, way, way, amount.of(transport))
                if not transport.encrypted:
                    _time(figures, BARE, sides.libpq, transport, way, "bare", amount.of(transport))


def _time(figures: Figures, name: str, side: Side, transport: Transport, compared: str, way: str, cancels: int) -> None:
    """Times a way to cancel, as one of those that are compared."""
    lines = side.measure(transport.conninfo, "times", way, cancels, environment=transport.environment)
    walls, processors = zip(*[(int(wall), int(processor)) for wall, processor in lines])
    figures.add(subject(transport, compared), "wall", "s", name, statistics.median(walls) * NANOSECOND)
    figures.add(subject(transport, compared), "processor", "s", name, statistics.mean(processors) * NANOSECOND)


def measure_counts(figures: Figures, sides: Sides, all_transports: list[Transport], amount: Amount) -> list[str]:
    """What does not depend on how busy the machine is: two at once. Returns remarks on what cannot be had here."""
    counters, remarks = [_count_allocations], []
    tools = (("strace", _count_system_calls, "system calls"), ("valgrind", _count_instructions, "instructions"))
    for tool, counter, lost in tools:
        try:
            run([tool, *(["-qq"] if tool == "strace" else ["-q", "--tool=none"]), "true"])
            counters.append(counter)
        except BenchError as error:  # not there, or not allowed here
            remarks.append(f"No {lost}: {tool} does not run here ({str(error).strip().splitlines()[0]}).")
    wanted = [transport for transport in all_transports if transport.name in (amount.counted_transports or TRANSPORTS)]
    work = [(counter, side, transport) for transport in wanted for side in sides.both for counter in counters]
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda job: (job[1], job[2], *job[0](job[1], job[2], amount.counted)), work)
        for side, transport, quantity, counted in done:
            if set(counted) != set(WAYS):
                raise BenchError(f"{side.name}, {transport.name}: {quantity} were counted of {sorted(counted)} only")
            for way, number in counted.items():
                figures.add(subject(transport, way), quantity, "", side.name, number / amount.counted)
    return remarks


def _count_allocations(side: Side, transport: Transport, cancels: int) -> tuple[str, dict[str, int]]:
    lines = side.measure(transport.conninfo, "counts", cancels, environment=transport.environment, counting=True)
    return "allocations", {way: int(calls) for way, calls in lines}


def _count_system_calls(side: Side, transport: Transport, cancels: int) -> tuple[str, dict[str, int]]:
    with tempfile.NamedTemporaryFile(mode="r", prefix="pqcancel-strace-") as output:
        side.measure(transport.conninfo, "counts", cancels, environment=transport.environment,
                     under=("strace", "-f", "-qq", "-e", "signal=none", "-o", output.name))
        counted: dict[str, int] = {}
        way = ""
        for line in output:
            mark = re.search(r'write\(-1, "(begin|end) (\w+)"', line)
            if mark:
                way = mark.group(2) if mark.group(1) == "begin" else ""
            elif way and re.match(r"\d+ +\w+\(", line):
                counted[way] = counted.get(way, 0) + 1
        return "system calls", counted


def _count_instructions(side: Side, transport: Transport, cancels: int) -> tuple[str, dict[str, int]]:
    with tempfile.TemporaryDirectory(prefix="pqcancel-callgrind-") as directory:
        side.measure(transport.conninfo, "counts", cancels, environment=transport.environment,
                     under=("valgrind", "-q", "--tool=callgrind", "--instr-atstart=no",
                            f"--callgrind-out-file={directory}/dump"))
        counted: dict[str, int] = {}
        for dump in Path(directory).iterdir():
            text = dump.read_text(errors="replace")
            way = re.search(r"^desc: Trigger: Client Request: (\w+)", text, re.MULTILINE)
            if way:
                counted[way.group(1)] = int(re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE).group(1))
        return "instructions", counted


def measure_steps(figures: Figures, sides: Sides, all_transports: list[Transport], amount: Amount) -> None:
    """The first cancel of a process, and the later ones of the same: a new process for each round."""
    for transport in all_transports:
        if transport.name not in (ONE_CA, BUNDLE, SYSTEM):
            continue
        for _ in range(amount.first_rounds):
            for side in sides.both if transport.name == SYSTEM else sides.all:
                lines = side.measure(transport.conninfo, "steps", 4, environment=transport.environment)
                numbers = [[int(word) * NANOSECOND for word in line] for line in lines]
                later = [statistics.median(column) for column in zip(*numbers[1:])]
                for when, row in (("first", numbers[0]), ("later", later)):
                    for quantity, number in zip(("Create", "dearest poll", "processor", "wall"), row):
                        figures.add(f"{transport.name}: {when}", quantity, "s", side.name, number)


def measure_crowd(figures: Figures, sides: Sides, transport: Transport, amount: Amount) -> None:
    name = AT_ONCE
    for _ in range(amount.crowd_rounds):
        for side in sides.all:
            (numbers,) = side.measure(transport.conninfo, "crowd", amount.crowd, environment=transport.environment)
            wall, processor, dearest, resident, _ = map(int, numbers)
            figures.add(name, "wall", "s", side.name, wall * NANOSECOND)
            figures.add(name, "processor", "s", side.name, processor * NANOSECOND / amount.crowd)
            figures.add(name, "dearest poll", "s", side.name, dearest * NANOSECOND)
            figures.add(name, "resident", "bytes", side.name, resident / amount.crowd)
    for side in sides.all:
        (numbers,) = side.measure(transport.conninfo, "crowd", amount.crowd, environment=transport.environment, counting=True)
        figures.add(name, "allocated", "bytes", side.name, int(numbers[-1]) / amount.crowd)


def measure_pairs(figures: Figures, sides: Sides, all_transports: list[Transport], amount: Amount) -> None:
    for transport in all_transports:
        if transport.name not in (ONE_CA, PLAINTEXT):
            continue
        for kind, name in (("new", CREATE), ("old", GET)):
            for _ in range(amount.rounds):
                for side in sides.both:
                    lines = side.measure(transport.conninfo, "pairs", kind, amount.pairs, environment=transport.environment)
                    wall = statistics.median(float(line[0]) for line in lines)
                    figures.add(name.format(transport.name), "wall", "s", side.name, wall * NANOSECOND)


def make_bundle(path: Path, machine: Path, ca: Path) -> int:
    """The machine's CAs, and the one of the test. Returns how many there are."""
    path.write_bytes(machine.read_bytes() + b"\n" + ca.read_bytes())
    return path.read_bytes().count(b"-----BEGIN CERTIFICATE-----")


def wait_until_settled(file: Path) -> None:
    """Until a file is so old that a change of it would show: pqcancel keeps nothing of a newer one. Users' files are old."""
    while time.time() - file.stat().st_ctime < SETTLED:
        time.sleep(0.1)
