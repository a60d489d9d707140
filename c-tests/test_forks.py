"""Children cancel too: with what they inherited and with what is their own, while their parents do."""

from __future__ import annotations

import pytest

import legacy
import programs
from comparison import Scenario
from hostile import CancelConnection

CHILDREN = 50
AT_ONCE = 50


@pytest.fixture(scope="module")
def forks(certs, servers):
    yield from programs.open_laboratory(legacy.build("forks"), certs, servers)


@pytest.mark.parametrize("parent_first", [0, 1], ids=["child-first", "parent-first"])
@pytest.mark.parametrize("transport", ["tls15", "tcp4"])
@pytest.mark.parametrize("run,calls", [("parents-cancel", 2), ("parents-session", 2), ("own-session", 2), ("grandchild", 3)])
def test_child_cancels(forks, tmp_path, run, calls, transport, parent_first):
    """With the parent's PGcancel, with one of its own of the parent's session, with one of a session of its own."""
    scenario = Scenario("child", transport, run, parent_first, script=legacy.real_server, shows="next query: 57014")
    outcome, attempts = legacy.run(forks, scenario, tmp_path / "home")
    assert ("child's query: 57014" if run == "own-session" else "\nquery: 57014") in outcome.transcript
    assert "child: " not in outcome.transcript, outcome.transcript  # it ended well
    assert attempts.delivered == attempts.calls == calls + parent_first, attempts


@pytest.mark.parametrize("transport", ["tls15", "tcp4"])
def test_parent_and_child_at_once(forks, tmp_path, transport):
    scenario = Scenario("fork", transport, "at-once", AT_ONCE, script=legacy.real_server)
    outcome, attempts = legacy.run(forks, scenario, tmp_path / "home")
    assert "child: " not in outcome.transcript, outcome.transcript
    assert attempts.delivered == attempts.calls == 2 * AT_ONCE + 1, attempts


@pytest.mark.parametrize("transport", ["tls15", "tcp4"])
def test_children_of_a_program_with_threads(forks, tmp_path, transport):
    """50 children, made while 8 threads allocate and cancel; each cancels by the old functions and by the new."""
    scenario = Scenario("fork", transport, "threads", CHILDREN, script=legacy.real_server)
    outcome, attempts = legacy.run(forks, scenario, tmp_path / "home")
    assert "child: " not in outcome.transcript, outcome.transcript
    assert outcome.transcript.count("child's other requests: 1\n") == CHILDREN, outcome.transcript
    assert attempts.delivered == attempts.calls >= 2 * CHILDREN, attempts


@pytest.mark.parametrize("transport", ["tls15", "tcp4"])
def test_a_fork_that_takes_long(forks, tmp_path, transport):
    """It holds up who carries the requests of the other threads: they wait, and do not take it for a lock of theirs."""
    scenario = Scenario("fork", transport, "long-fork", script=legacy.real_server)
    _, attempts = legacy.run(forks, scenario, tmp_path / "home")
    assert attempts.delivered == attempts.calls == 2, attempts


@pytest.mark.parametrize("transport,refused", [("tls15", {legacy.STUCK: 1}), ("tcp4", {})], ids=["tls15", "tcp4"])
def test_a_cancel_in_the_middle_of_a_fork(forks, tmp_path, transport, refused):
    """By the thread that forks, as a signal handler of its may: who carries the request would wait for it in vain."""
    scenario = Scenario("fork", transport, "within", script=legacy.real_server)
    _, attempts = legacy.run(forks, scenario, tmp_path / "home")
    assert (attempts.calls, attempts.refused) == (2, refused), attempts


def hold_the_first(certs):
    """The first cancel gets no answer before the driver stands at the gate; the others go to the real server."""
    def script(connection: CancelConnection) -> None:
        if connection.number > 1:
            return legacy.real_server(certs)(connection)
        connection.receive_packet()
        connection.run.tell_driver(b"s")
        connection.run.at_gate("on", connection.close)
    return script


def test_fork_while_a_cancel_is_under_way(forks, tmp_path):
    """The child has none of its parent's descriptors but those of before, and cancels by itself."""
    scenario = Scenario("fork", "tls15", "in-flight", script=hold_the_first, gates="on", shows="child's descriptors: as before")
    outcome, attempts = legacy.run(forks, scenario, tmp_path / "home")
    assert "child: " not in outcome.transcript, outcome.transcript
    assert (attempts.calls, attempts.delivered) == (3, 2), attempts


def test_exec_while_a_cancel_is_under_way(forks, tmp_path):
    scenario = Scenario("exec", "tls15", "exec", script=hold_the_first, gates="on", shows="over exec: as before")
    _, attempts = legacy.run(forks, scenario, tmp_path / "home")
    assert (attempts.calls, attempts.delivered) == (1, 0), attempts
