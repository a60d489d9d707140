"""What the tests of PQgetCancel and PQcancel share: their programs, and what came of the attempts that those made."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import programs
import wire
from certs import Certs
from comparison import Laboratory, Outcome, Scenario
from hostile import CancelConnection, Script
from programs import BUILD, SOURCES

# Seconds that PQcancel may take here: its own 10 are too few for many at once on a machine with other things to do.
BOUND = 240
PATIENT = {"PQCANCEL_TIMEOUT": str(BOUND)}
SLACK = 7  # seconds that such a machine may be late; on top of a limit of 3 still no more than PQcancel's own 10

# What PQcancel says where the one who carries the request waits for a lock that the interrupted program may hold.
STUCK = "PQcancel() -- interrupted while the program held a lock; nothing was sent, try again"


def real_server(_certs: Certs) -> Script:
    """For Scenario.script: the real server answers, and whichever side goes away first is followed by the other."""
    return programs.always_closed(CancelConnection.pass_through)


def build(name: str, *libraries: str) -> Path:
    """c-tests/NAME.c, a table of scenarios that make attempts."""
    sources = ("driver.c", f"{name}.c", "attempts.c", "query.c", "process_state.c", "session.c", "transcript.c")
    return programs.build(BUILD / name, sources, "-pthread", "-lm", *libraries)


def build_loaded(directory: Path) -> str:
    """The object that programs load; they export a function to it (-rdynamic)."""
    return str(programs.cc(directory / "loaded.so", SOURCES / "loaded.c", "-shared", "-fPIC"))


def build_allocator(directory: Path, *, spins: bool = False) -> str:
    flags = ["-shared", "-fPIC", "-fno-builtin", "-pthread", *(["-DSPINS"] if spins else [])]
    library = directory / ("spinning_allocator.so" if spins else "handler_allocator.so")
    return str(programs.cc(library, SOURCES / "handler_allocator.c", *flags))


@dataclass
class Attempts:
    """What say_attempts() of attempts.c told, of all processes together."""

    calls: int = 0
    delivered: int = 0
    errno_changed: int = 0
    errbuf_wrong: int = 0
    longest: float = 0.0  # seconds
    refused: Counter[str] = field(default_factory=Counter)  # messages

    def __str__(self) -> str:
        told = f"{self.delivered} of {self.calls} delivered, the longest took {self.longest * 1000:.1f} ms"
        return told + "".join(f"; {count} times {message!r}" for message, count in self.refused.items())


def attempts_of(transcript: str) -> Attempts:
    total = Attempts()
    for line in re.findall(r"^attempts: (.*)$", transcript, re.MULTILINE):
        calls, delivered, errno_changed, errbuf_wrong, longest = map(int, re.findall(r"\d+", line))
        total.calls += calls
        total.delivered += delivered
        total.errno_changed += errno_changed
        total.errbuf_wrong += errbuf_wrong
        total.longest = max(total.longest, longest / 1e6)
    for count, message in re.findall(r"^refused (\d+) times: (.*)$", transcript, re.MULTILINE):
        total.refused[message] += int(count)
    return total


def kept_promises(transcript: str) -> Attempts:
    """What every call of PQcancel promises, whatever came of it."""
    attempts = attempts_of(transcript)
    assert attempts.calls > 0, transcript
    assert attempts.delivered + sum(attempts.refused.values()) == attempts.calls, f"a failure without a message:\n{transcript}"
    assert (attempts.errno_changed, attempts.errbuf_wrong) == (0, 0), transcript
    assert attempts.longest < BOUND + SLACK, transcript
    return attempts


def requests(outcome: Outcome) -> int:
    """How many cancel requests were on the wire, in the clear or encrypted."""
    return sum(wire_requests(connection) for connection in outcome.connections)


def wire_requests(connection: CancelConnection) -> int:
    if wire.is_readable(connection):
        return connection.sent_by_client.count(wire.CANCEL_REQUEST_CODE)
    return sum(size in wire.SEALED_CANCEL_REQUESTS for size in wire.read(connection)[1])


def run(laboratory: Laboratory, scenario: Scenario, directory: Path) -> tuple[Outcome, Attempts]:
    """Runs a scenario and holds it to the promises. What was delivered was on the wire, and nothing else was, but for the
    other requests that the transcript tells of: those were no attempts."""
    scenario = replace(scenario, environment={**PATIENT, **scenario.environment})
    outcome = programs.run_ours(laboratory, scenario, directory)
    attempts = kept_promises(outcome.transcript)
    others = sum(map(int, re.findall(r"other requests: (\d+)$", outcome.transcript, re.MULTILINE)))
    told = f"{requests(outcome)} requests on the wire, {attempts}\n{outcome.transcript}"
    assert requests(outcome) == attempts.delivered + others, told
    print(f"{scenario.id}: {attempts}")
    return outcome, attempts
