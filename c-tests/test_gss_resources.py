"""A good guest, also over GSSAPI: what a process has is as before, however often its sessions are cancelled."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

import gss_scripts
import programs
from comparison import Scenario, compare
from gss_scripts import after_cancel_request, after_gssenc_request, after_token
from hostile import CancelConnection
from programs import BUILD, always_closed
from scripts import FORGED_ERROR, close, reset
from test_memory import LEAKS, assert_nothing_found, wrapped
from test_resources import GOOD_AGAIN, NO_CACHE

CYCLES = 40
MEMORY_CYCLES = 200
NEVER_AGAIN = """PQcancelBlocking -> 0  status=BAD socket=-1 error=""
PQcancelReset -> void  status=ALLOCATED socket=-1 error=""
PQcancelStart -> 0  status=BAD socket=-1 error=""
PQcancelFinish
exit status 0
"""

# How a cancel can fail, or succeed.
WAYS = {
    "success": CancelConnection.pass_through,
    "refused": after_gssenc_request(close, b"N"),
    "closed": after_token(close),
    "garbage": after_token(close, b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    "half-a-token": gss_scripts.with_own_token(lambda token: token[:50], reset),
    "answered": after_cancel_request(close, lambda server: server.write(FORGED_ERROR)),
    "not-confidential": after_cancel_request(close, lambda server: server.write(b"N", confidential=False)),
    "reset": after_cancel_request(reset),
}
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def guest(certs, gss_servers):
    """As `gss`, with guest.c in the driver's place."""
    yield from programs.open_laboratory(programs.build_guest(), certs, gss_servers)


def delivered(way: str) -> str:
    return "all" if way == "success" else "none"


def scenario_of(way: str, run: str, number: int = 0, **rest) -> Scenario:
    return Scenario(f"gss-{way}", "gss", run, number, script=lambda _: always_closed(WAYS[way]), **rest)


@pytest.mark.usefixtures("acceptor")
@each_way
def test_descriptors_stay_as_before(guest, tmp_path, way):
    shows = f"{CYCLES} cycles, {delivered(way)} delivered, descriptors: as before"
    programs.run_ours(guest, scenario_of(way, "descriptors", CYCLES, shows=shows), tmp_path / "home")


@pytest.mark.usefixtures("acceptor")
@each_way
def test_the_process_is_as_before(guest, tmp_path, way):
    scenario = scenario_of(way, "state", shows=f"delivered: {delivered(way)}\nstate: as before")
    programs.run_ours(guest, scenario, tmp_path / "home")


@pytest.mark.usefixtures("acceptor")
@each_way
def test_nothing_is_printed(guest, tmp_path, way):
    scenario = scenario_of(way, "quiet", shows=f"delivered: {delivered(way)}, written: 0 bytes")
    programs.run_ours(guest, scenario, tmp_path / "home")


def test_no_descriptor_left(guest, tmp_path):
    """None to read the user's tickets with. With descriptors again the same objects work."""
    scenario = Scenario("gss-no-descriptor", "gss", "exhausted", 0, shows="GSSAPI encryption required but no credential cache")
    compare(guest, scenario, tmp_path / "home", "system")
    compare(guest, scenario, tmp_path / "home", "18")


def test_one_descriptor_left(guest, tmp_path):
    """That one is the socket's. A wilful difference: what failed so works never again in libpq 18."""
    scenario = Scenario("gss-one-descriptor", "gss", "exhausted", 1, shows="could not initiate GSSAPI security context: ")
    transcript = programs.run_ours(guest, scenario, tmp_path / "home").transcript
    assert all(text in transcript for text in GOOD_AGAIN), transcript
    theirs = guest.over_libpq18(scenario, tmp_path / "home").transcript
    assert scenario.shows in theirs and theirs.endswith(NEVER_AGAIN), theirs


def grown(guest, conninfo: str, environment: dict[str, str]) -> tuple[int, int]:
    """Bytes allocated and kB resident, after so many cancels in four ways, the fourth given up in mid-flight."""
    result = subprocess.run([guest.build / "driver-pqcancel", conninfo, "memory", str(MEMORY_CYCLES)], env=environment,
                            stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, ""), result
    assert "descriptors: as before" in result.stdout, result
    allocated, resident = (int(re.search(rf"{what}: ([+-]\d+)", result.stdout).group(1)) for what in ("allocated", "resident"))
    return allocated, resident


def test_memory_does_not_grow(guest, realm, gss_servers):
    """Of ours, and of what the library has given us to give back."""
    conninfo = gss_servers["gss"].conninfo(host="localhost", hostaddr="127.0.0.1", gssencmode="require")
    allocated, resident = grown(guest, conninfo, programs.environment(GLIBC_TUNABLES=NO_CACHE, **realm.environment))
    print(f"{MEMORY_CYCLES} cancels: {allocated:+d} bytes allocated, {resident:+d} kB resident")
    assert allocated < MEMORY_CYCLES  # a leak of one byte a cancel would show
    assert resident < 512


@pytest.fixture(scope="module")
def under_valgrind(gss, certs, gss_servers):
    """As `gss` and as `old`, with every program under valgrind."""
    if not shutil.which("valgrind"):
        pytest.skip("valgrind is not installed: apt-get install valgrind")
    made = {name: programs.laboratory_of(wrapped(build, BUILD / f"valgrind-gss-{name}", LEAKS[name]), certs, gss_servers)
            for name, build in (("new", gss.build), ("old", programs.build_old_functions()))}
    yield made
    for one in made.values():
        one.close()


VALGRIND = [
    ("new", Scenario("success", "gss", "cycles", 5, shows="descriptors: +0")),
    ("new", Scenario("mixed-resets", "gss", "mixed-resets", shows="ended=1")),
    *(("new", scenario_of(way, "polled", shows="status=BAD")) for way in ("half-a-token", "answered")),
    ("old", Scenario("old", "gss", "often", 5, shows="descriptors: +0")),
    ("old", Scenario("old-refused", "gss", "cancel", script=lambda _: always_closed(WAYS["refused"]), shows="PQcancel -> 0")),
]


@pytest.mark.usefixtures("acceptor")
@pytest.mark.parametrize("program,scenario", VALGRIND, ids=[f"{program}-{scenario.id}" for program, scenario in VALGRIND])
def test_valgrind_finds_nothing(under_valgrind, tmp_path, program, scenario):
    """As over TLS (test_memory.py), and of the GSSAPI library neither. Nothing is suppressed."""
    assert_nothing_found(under_valgrind[program].over_pqcancel(scenario, tmp_path / "home", "system"), scenario)
