"""Cancels in many threads at once, at the end of the process, and where the machine has nothing left."""

from __future__ import annotations

import os

import pytest

import legacy
import programs
from comparison import Scenario
from hostile import CancelConnection

SESSIONS = 64
REPETITIONS = 50


@pytest.fixture(scope="module")
def threads(certs, servers):
    yield from programs.open_laboratory(legacy.build("threads"), certs, servers)


@pytest.mark.parametrize("transport", ["tls15", "tcp4"])
def test_64_threads_cancel_64_sessions(threads, tmp_path, transport):
    """In threads, and then again in handlers that interrupt those."""
    scenario = Scenario("many", transport, "many", SESSIONS, sessions=SESSIONS, script=legacy.real_server,
                        shows=f"{SESSIONS} of {SESSIONS} cancelled")
    outcome, attempts = legacy.run(threads, scenario, tmp_path / "home")
    assert attempts.delivered == attempts.calls == 2 * SESSIONS, (attempts, outcome.transcript)


def held(certs):
    """Reads what comes first, and never answers."""
    def script(connection: CancelConnection) -> None:
        connection.receive_packet()
        connection.hold()
    return programs.always_closed(script)


@pytest.mark.parametrize("transport", ["tls15", "tcp4"])
@pytest.mark.parametrize("server", ["real", "held"])
@pytest.mark.parametrize("run", ["exit", "quick-exit", "dlclose"])
def test_the_end_while_cancels_are_under_way(threads, tmp_path, run, server, transport):
    """Three threads cancel without a pause, or one waits for a server that never answers: the process ends as it wants to."""
    script, says_so = (held, {"DRIVER_HELD": "1"}) if server == "held" else (legacy.real_server, {})
    scenario = Scenario(f"end-{server}", transport, run, REPETITIONS, script=script,
                        environment={"DRIVER_LIBRARY": str(programs.LIBRARY), **says_so})
    if run == "dlclose":  # what is unloaded must have been loaded: by a program that is linked with libpq only
        outcome = threads.over_libpq18(scenario, tmp_path / "home")
    else:
        outcome = programs.run_ours(threads, scenario, tmp_path / "home")
    assert outcome.transcript.endswith(f"{REPETITIONS} of {REPETITIONS} ended with the status given\nexit status 0\n"), outcome
    assert outcome.stderr == ""
    assert transport == "tcp4" or not any(programs.wire.is_readable(c) for c in outcome.connections)
    assert len(outcome.connections) >= REPETITIONS / 2, "hardly a cancel was under way"


@pytest.mark.parametrize("others,calls", [(0, 1), (1, 21)])
@pytest.mark.parametrize("transport", ["tls15", "tcp4"])
def test_the_process_ends_with_its_last_thread(threads, tmp_path, transport, others, calls):
    """Its own, that is: the main thread leaves by pthread_exit(), with no other one or with one that still cancels."""
    scenario = Scenario("last", transport, "last-thread", others, script=legacy.real_server)
    _, attempts = legacy.run(threads, scenario, tmp_path / "home")
    assert attempts.delivered == attempts.calls == calls, attempts


def test_no_thread_to_be_had(threads, tmp_path):
    """PQgetCancel works, PQcancel says that it does not, and the next one works when there are threads again."""
    # The program becomes the user nobody, who may not read the test's files.
    scenario = Scenario("limit", "tls15", "no-thread", options={"sslmode": "require", "sslrootcert": None},
                        environment={"HOME": os.devnull}, script=legacy.real_server,
                        shows="PQgetCancel -> object\nPQcancel -> 0\n")
    outcome, attempts = legacy.run(threads, scenario, tmp_path / "home")
    assert attempts.refused == {"PQcancel() -- could not start the thread that encrypts cancel requests": 1}, attempts
    assert "with threads again: PQcancel -> 1" in outcome.transcript
    assert len(outcome.connections) == 1, "something was sent for the first"


@pytest.mark.parametrize("transport", ["tls15", "tcp4", "unix"])
def test_no_descriptor_to_be_had(threads, tmp_path, transport):
    scenario = Scenario("limit", transport, "no-descriptor", script=legacy.real_server, shows="PQcancel -> 0\n")
    outcome, attempts = legacy.run(threads, scenario, tmp_path / "home")
    assert attempts.refused == {"PQcancel() -- socket() failed: error 24": 1}, attempts
    assert "with descriptors again: PQcancel -> 1" in outcome.transcript
    assert len(outcome.connections) == 1, "something was sent for the first"
