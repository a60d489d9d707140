"""Cancels from signal handlers: wherever the signal interrupts the program, and whatever lock it holds there."""

from __future__ import annotations

import re
import subprocess

import pytest

import legacy
import programs
from comparison import Scenario
from library import has_private_openssl

STORM = 10000
SMALL_STORM = 500
NO_CACHE = "glibc.malloc.tcache_count=0"  # or what a thread keeps for later would count as allocated


@pytest.fixture(scope="module")
def storm(certs, servers):
    yield from programs.open_laboratory(legacy.build("storm", "-lssl", "-lcrypto", "-rdynamic"), certs, servers)


def storm_environment(storm) -> dict[str, str]:
    return {"DRIVER_CERTIFICATES": str(storm.certs.ca), "DRIVER_LOADED": legacy.build_loaded(storm.build),
            "GLIBC_TUNABLES": NO_CACHE, **legacy.PATIENT}


def growth(transcript: str) -> tuple[int, int]:
    """Bytes allocated, kB resident."""
    allocated, resident = (int(re.search(rf"{what}: ([+-]\d+)", transcript).group(1)) for what in ("allocated", "resident"))
    return allocated, resident


def check_delivery(work: str, attempts: legacy.Attempts) -> None:
    """All, unless the one who carries the request may need a lock that the program holds: its threads may share an arena of
    malloc's with it, and the last two are inside the loader, and inside pqcancel itself. An OpenSSL may be shared, too."""
    if work == "allocate" or work == "openssl" and has_private_openssl():
        assert attempts.delivered == attempts.calls, attempts
    assert set(attempts.refused) <= {legacy.STUCK} and attempts.delivered > 0.9 * attempts.calls, attempts


@pytest.mark.parametrize("scenario", ["allocate", "allocate-threads"])
def test_storm(storm, scenario):
    """10,000 signals hit a program that allocates and frees in a tight loop, in 1 thread and in 8. Straight to the server: in
    this number a proxy would be the slowest part."""
    server = storm.servers["15"]
    conninfo = server.conninfo(host="localhost", hostaddr=server.host, sslmode="verify-full", sslrootcert=storm.certs.ca)
    environment = programs.environment(DRIVER_MONITOR=server.conninfo(sslmode="disable"), **storm_environment(storm))
    result = subprocess.run([storm.build / "driver-pqcancel", conninfo, scenario, str(STORM)], env=environment,
                            stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, ""), result
    attempts = legacy.kept_promises(result.stdout)
    allocated, resident = growth(result.stdout)
    print(f"{scenario}: {attempts}; {allocated:+d} bytes allocated, {resident:+d} kB resident")
    assert attempts.calls > STORM
    check_delivery(scenario, attempts)
    assert allocated < STORM, result.stdout  # a leak of one byte a cancel would show
    assert resident < 2048, result.stdout
    assert "descriptors: as before" in result.stdout and "query: 57014" in result.stdout, result.stdout


@pytest.mark.parametrize("transport", ["tls15", "tcp4"])
@pytest.mark.parametrize("run", ["allocate", "allocate-threads", "openssl", "loader", "cancelling"])
def test_storm_on_the_wire(storm, tmp_path, run, transport):
    """A smaller one: also inside the program's OpenSSL, inside the loader, and inside pqcancel itself."""
    scenario = Scenario("storm", transport, run, SMALL_STORM, script=legacy.real_server, environment=storm_environment(storm),
                        options={"sslrootcert": "{c.ca}"}, shows="query: 57014")
    outcome, attempts = legacy.run(storm, scenario, tmp_path / "home")
    assert attempts.calls > SMALL_STORM
    check_delivery(run, attempts)
    assert growth(outcome.transcript)[0] < SMALL_STORM, outcome.transcript
    assert "descriptors: as before" in outcome.transcript, outcome.transcript


def in_lock(run: str, transport: str, number: int = 0, **rest) -> Scenario:
    return Scenario("in-lock", transport, run, number, script=legacy.real_server, **rest)


LOCKS = ["no-lock", "allocator", "spinning-allocator", "constructor", "iteration", "openssl-memory", "openssl-store"]
DELIVERED = "in the lock: PQcancel -> 1\nafterwards: PQcancel -> 1\nquery: 57014\n"
REFUSED = "in the lock: PQcancel -> 0\nafterwards: PQcancel -> 1\nquery: runs on\nagain: PQcancel -> 1\nquery: 57014\n"


@pytest.mark.parametrize("transport", ["tls15", "tcp4"])
@pytest.mark.parametrize("lock", LOCKS)
def test_signal_in_a_lock(locks, tmp_path, lock, transport):
    """PQcancel returns in time, and it tells the truth: the query has been cancelled, or is not, not later either."""
    allocator = lock.endswith("allocator") and legacy.build_allocator(locks.build, spins=lock.startswith("spinning"))
    environment = {"LD_PRELOAD": allocator or "", "DRIVER_LOADED": legacy.build_loaded(locks.build)}
    scenario = in_lock(lock, transport, sessions=2, environment=environment)
    outcome, attempts = legacy.run(locks, scenario, tmp_path / "home")
    assert set(attempts.refused) <= {legacy.STUCK}, attempts
    is_needed = transport == "tls15" and (allocator or lock.startswith("openssl-") and not has_private_openssl())
    assert DELIVERED in outcome.transcript or is_needed and REFUSED in outcome.transcript, outcome.transcript


@pytest.mark.parametrize("held", [0, 1], ids=["free", "held"])
@pytest.mark.parametrize("run", ["within-get-cancel", "within-blocking", "within-first-blocking"])
def test_signal_within_pqcancel(locks, tmp_path, run, held):
    """The signal interrupts pqcancel's own functions where they allocate, with the allocator's lock held or not."""
    scenario = in_lock(run, "tls15", held, environment={"LD_PRELOAD": legacy.build_allocator(locks.build)})
    outcome, attempts = legacy.run(locks, scenario, tmp_path / "home")
    assert set(attempts.refused) <= {legacy.STUCK}, attempts
    afterwards = re.findall(r"^after allocation \d+: PQcancel -> (\d)", outcome.transcript, re.MULTILINE)
    assert afterwards and set(afterwards) == {"1"}, outcome.transcript
    assert run == "within-get-cancel" or len(afterwards) > 8, "too few allocations to be interrupted in"
