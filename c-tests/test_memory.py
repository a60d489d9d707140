"""Memory: none lost or misused (valgrind), and none to be had (malloc fails on order)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import programs
import scripts
from comparison import Scenario
from hostile import CancelConnection
from library import has_private_openssl
from programs import BUILD, SOURCES, always_closed
from scripts import close, reset, tls_context

VALGRIND = ["valgrind", "--quiet", "--leak-check=full", "--track-fds=yes", "--error-exitcode=99", "--num-callers=30"]
# The courier lives until the program exits, and what the C library holds for a thread counts as possibly lost by then.
LEAKS = {"new": "definite,indirect,possible", "old": "definite,indirect"}
FINDING = r"Invalid|uninitialised|lost in loss|Mismatched"


@pytest.fixture(scope="module")
def under_valgrind(laboratory, old, certs, servers):
    """As `laboratory` and as `old`, with every program under valgrind."""
    if not shutil.which("valgrind"):
        pytest.skip("valgrind is not installed: apt-get install valgrind")
    made = {name: programs.laboratory_of(wrapped(original.build, BUILD / f"valgrind-{name}", LEAKS[name]), certs, servers)
            for name, original in (("new", laboratory), ("old", old))}
    yield made
    for one in made.values():
        one.close()


def wrapped(build: Path, directory: Path, leaks: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    wrapper = directory / "driver-pqcancel"
    command = [*VALGRIND, f"--show-leak-kinds={leaks}", f"--errors-for-leak-kinds={leaks}", build / "driver-pqcancel"]
    clock = programs.cc(directory / "slow_clock.so", SOURCES / "slow_clock.c", "-shared", "-fPIC")
    wrapper.write_text(f"#!/bin/sh\nLD_PRELOAD={clock} exec {' '.join(map(str, command))} \"$@\"\n")
    wrapper.chmod(0o755)
    return directory


def good(certs):
    return tls_context(certs, certs.server)


SCENARIOS = [
    Scenario("success", "tcp4", shows="PQcancelPoll -> OK"),
    Scenario("success", "unix", "blocking", shows="PQcancelBlocking -> 1"),
    Scenario("success", "tls15", shows="PQcancelPoll -> OK"),
    Scenario("cycles", "tls15", "cycles", 3, shows="descriptors: +0"),
    Scenario("mixed-resets", "tcp4", "mixed-resets", shows="ended=1"),
    Scenario("finish-in-flight", "tls15", "finish-in-flight", shows="ended=1"),
    Scenario("null", "tcp4", "null-poll-and-reset", shows="survived"),
    Scenario("closed-session", "tcp4", "closed-session", shows="connection not open"),
    Scenario("client-certificate", "tls15", "blocking", shows="PQcancelBlocking -> 1",
             options={"sslcert": "{c.client.cert}", "sslkey": "{c.client.key}", "sslcrl": "{c.crl}"}),
    Scenario("answer-N", "tls15", script=lambda c: scripts.after_ssl_request(close, b"N"), shows="SSL was required"),
    Scenario("wrong-CA", "tls15", script=lambda c: always_closed(scripts.with_certificate("other_server")(c)),
             shows="certificate verify failed"),
    Scenario("wrong-name", "tls15", script=lambda c: always_closed(scripts.with_certificate("wrong_name")(c)),
             shows="does not match host name"),
    Scenario("not-TLS", "tls15", script=lambda c: scripts.after_client_hello("tls", close, bytes(range(256))),
             shows="status=BAD"),
    Scenario("half-a-flight-then-reset", "tls15", script=lambda c: scripts.in_server_flight("tls", good(c), 300, reset),
             shows="status=BAD"),
    Scenario("reset-at-once", "tcp4", script=lambda c: reset, shows="status=BAD"),
]


OLD_FUNCTIONS = [
    Scenario("old", "tcp4", "often", 3, shows="descriptors: +0"),
    Scenario("old", "unix", "cancel", shows="PQcancel -> 1"),
    Scenario("old", "tls15", "often", 3, shows="descriptors: +0"),
    Scenario("old", "tls15", "request", shows="PQrequestCancel -> 1"),
    Scenario("old", "tls15", "half-open", shows="no cancellation key received"),
    Scenario("old", "tcp4", "null", shows="no cancel object supplied"),
    Scenario("old-crossing", "tcp4", "crossing", shows="ours, cancelled by libpq -> 1"),
    Scenario("old-refused", "tls15", "request", between=scripts.nobody_listens, shows="connect() failed: error 111"),
    Scenario("old-answer-N", "tls15", "cancel", script=lambda c: scripts.after_ssl_request(close, b"N"),
             shows="SSL was required"),
]
CASES = [pytest.param("new", s, id=s.id) for s in SCENARIOS] + [pytest.param("old", s, id=s.id) for s in OLD_FUNCTIONS]


@pytest.mark.parametrize("program,scenario", CASES)
def test_valgrind_finds_nothing(under_valgrind, tmp_path, program, scenario):
    """Neither a leak nor an invalid access (exit status 99), and every descriptor closed. Nothing is suppressed."""
    assert_nothing_found(under_valgrind[program].over_pqcancel(scenario, tmp_path / "home", "system"), scenario)


def assert_nothing_found(outcome, scenario: Scenario) -> None:
    both = f"{outcome.transcript}\n{outcome.stderr}"
    assert "exit status 0\n" in outcome.transcript, both
    assert outcome.shows(scenario.shows), both
    assert open_sockets(outcome.stderr) == [], both
    findings = [line for line in outcome.stderr.splitlines() if re.search(FINDING, line)]
    assert findings == [], both


def open_sockets(report: str) -> list[str]:
    """The descriptors that valgrind counts at the end, without those that the program was started with."""
    blocks = re.split(r"(?=Open )", report)
    return [block for block in blocks if block.startswith("Open ") and "<inherited from parent>" not in block]


# Out of memory.

MUST_NOT_HAPPEN = ("failed, and not good again", "failed without a message", "descriptors leaked", "died", "hung")

# How (see starving.c), over what, and how far apart the failing calls are: a TLS cancel has some thousand.
SWEEPS = [
    ("fork-ours-on", "tcp4", 1), ("fork-ours-once", "tcp4", 1), ("fork-all-on", "tcp4", 1), ("fork-all-once", "tcp4", 1),
    ("here-ours-on", "tcp4", 1), ("here-ours-once", "unix", 1), ("here-all-once", "unix", 1),
    ("fork-ours-on", "tls15", 41), ("fork-ours-once", "tls15", 41), ("fork-all-once", "tls15", 43),
    ("thread-ours-on", "tls15", 7), ("thread-ours-once", "tls15", 7), ("here-ours-on", "tls15", 101),
    ("warm-ours-on", "tls15", 3), ("warm-ours-once", "tls15", 7), ("warm-all-once", "tls15", 2),
    ("old-ours-on", "tcp4", 1), ("old-ours-once", "unix", 1), ("old-all-on", "tcp4", 1),
    ("old-ours-on", "tls15", 13), ("old-ours-once", "tls15", 17),
]


@pytest.fixture(scope="module")
def starving(certs, servers):
    directory = programs.build(BUILD / "starving", ("starving.c", "transcript.c"), oracle=False)
    programs.cc(directory / "starve.so", SOURCES / "starve.c", "-shared", "-fPIC", "-fno-builtin")
    yield from programs.open_laboratory(directory, certs, servers)


@pytest.mark.parametrize("how,transport,step", SWEEPS)
def test_out_of_memory(starving, tmp_path, how, transport, step):
    """Whichever allocation fails: a failure value and a message, or NULL; the process lives on, and so does the object."""
    if not has_private_openssl():
        if transport == "tls15" and "all" in how and "warm" not in how:
            pytest.skip("a system's OpenSSL that meets a shortage in its initialization is no good afterwards")
        if "ours" in how:
            step = max(1, step // 10)  # what OpenSSL allocates is then none of them
    scenario = Scenario("starving", transport, how, step, environment={"LD_PRELOAD": str(starving.build / "starve.so")},
                        script=lambda c: always_closed(CancelConnection.pass_through))
    outcome = starving.over_pqcancel(scenario, tmp_path / "home", "system")
    both = f"\n{outcome.transcript}\n{outcome.stderr[-1000:]}"
    assert "exit status 0\n" in outcome.transcript, f"the process died{both}"
    found = dict(re.findall(r"^(.+?): (\d+.*)$", outcome.transcript, re.MULTILINE))
    at_once, in_the_middle = (int(found[name].split()[0]) for name in ("NULL", "failed with a message"))
    assert at_once + in_the_middle > 0, "no shortage was noticed at all"
    if how.startswith("old"):
        assert (in_the_middle > 0) == (transport == "tls15"), "in plaintext PQcancel allocates nothing, over TLS it does"
    # In plaintext the only allocations in the middle of a cancel are reallocations: when just one of them fails, the
    # allocation tried in its place succeeds.
    elif transport == "tls15" or how.endswith("-on"):
        assert at_once > 0 and in_the_middle > 0, "none came in the middle of a cancel"
    assert {name: found[name] for name in MUST_NOT_HAPPEN} == dict.fromkeys(MUST_NOT_HAPPEN, "0"), both
    if transport == "tls15":
        assert not any(programs.wire.is_readable(connection) for connection in outcome.connections)


def test_the_shortage_is_real(starving, tmp_path, servers):
    """Control experiment: without the preload the program says so, and does not pass."""
    conninfo = servers["15"].conninfo(sslmode="disable")
    result = subprocess.run([starving.build / "driver-pqcancel", conninfo, "fork-ours-on"], env=programs.environment(),
                            capture_output=True, text=True)
    assert result.returncode == 3 and "starve.so is not preloaded" in result.stderr
