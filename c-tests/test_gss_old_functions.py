"""PQcancel and its like over sessions that are encrypted with GSSAPI: what callers see is libpq's, and nothing is readable."""

from __future__ import annotations

import shutil
import signal
import subprocess

import pytest

import legacy
import programs
import scripts
import wire
from comparison import Scenario, cases, compare
from gss_scripts import after_cancel_request, after_gssenc_request, after_token
from programs import always_closed
from scripts import FORGED_ERROR, close, hold, reset
from test_forks import hold_the_first
from test_gss_tickets import CACHE, FILE, LOSSES, tickets  # noqa: F401: the last is a fixture
from test_old_functions import DELIVERED, LIFE

FAILED = r'PQcancel -> 0 errno kept, errbuf "PQcancel() -- {}\n'
SIGNALS = 40
AT_ONCE = 30
SESSIONS = 8


@pytest.fixture(scope="module")
def old_gss(certs, gss_servers):
    """As `old`, for sessions that are encrypted with GSSAPI."""
    yield from programs.open_laboratory(programs.build_old_functions(), certs, gss_servers)


@pytest.fixture(scope="module")
def forks(certs, gss_servers):
    yield from programs.open_laboratory(legacy.build("forks"), certs, gss_servers)


@pytest.fixture(scope="module")
def storm(certs, gss_servers):
    yield from programs.open_laboratory(legacy.build("storm", "-lssl", "-lcrypto", "-rdynamic"), certs, gss_servers)


@pytest.fixture(scope="module")
def threads(certs, gss_servers):
    yield from programs.open_laboratory(legacy.build("threads"), certs, gss_servers)


def run_attempts(laboratory, scenario: Scenario, directory):
    """As legacy.run, and whatever is sent is encrypted with GSSAPI and nothing else. (What is given up on sends nothing.)"""
    outcome, attempts = legacy.run(laboratory, scenario, directory)
    assert {connection.sent_by_client[:8] for connection in outcome.connections} <= {wire.GSSENC_REQUEST, b""}, outcome.wire
    return outcome, attempts


# Callers see the same; what differs is on the wire, and that is the point.
SCENARIOS = [Scenario("old-gss" if run not in ("half-open", "closed") else "old", "gss", run, number, shows=shows)
             for run, number, shows in LIFE]
SCENARIOS += [Scenario("old-refused", "gss", run, between=scripts.nobody_listens,
                       shows=r"PQcancel() -- connect() failed: error 111\n") for run in ("cancel", "request")]


@pytest.mark.parametrize("scenario,host", cases(SCENARIOS))
def test_same_as_libpq18(old_gss, tmp_path, scenario, host):
    compare(old_gss, scenario, tmp_path / "home", host)


# What becomes of the cancel, by what the server does (libpq sends it in the clear and can say nothing of the kind).
SERVERS = {
    "close": (after_cancel_request(close), DELIVERED),
    "reset": (after_cancel_request(reset), DELIVERED),
    "answer": (after_cancel_request(close, lambda server: server.write(FORGED_ERROR)),
               FAILED.format("unexpected response from server")),
    "refuses": (after_gssenc_request(close, b"N"),
                FAILED.format("server doesn't support GSSAPI encryption, but it was required")),
    "answers-E": (after_gssenc_request(close, FORGED_ERROR),
                  FAILED.format("server sent an error response during GSS encryption exchange")),
    "closes": (after_gssenc_request(close), FAILED.format("server closed the connection unexpectedly")),
    "closes-after-token": (after_token(close), FAILED.format("server closed the connection unexpectedly")),
    "garbage": (after_token(close, b"HTTP/1.1 400 Bad Request\r\n\r\n"),
                FAILED.format("oversize GSSAPI packet sent by the server (1213486160 > 65532)")),
    "not-confidential": (after_cancel_request(close, lambda server: server.write(b"N", confidential=False)),
                         FAILED.format("incoming GSSAPI message did not use confidentiality")),
}


@pytest.mark.usefixtures("acceptor")
@pytest.mark.parametrize("gssencmode", ["require", "prefer"])
@pytest.mark.parametrize("name", SERVERS)
def test_a_server_that_is_none(old_gss, tmp_path, name, gssencmode):
    """Also with gssencmode=prefer, where libpq's newer functions fall back. run_ours sees that nothing is readable."""
    script, shows = SERVERS[name]
    scenario = Scenario("old-gss-server", "gss", "cancel", options={"gssencmode": gssencmode, "sslmode": "disable"},
                        script=lambda _: always_closed(script), shows=shows)
    outcome = programs.run_ours(old_gss, scenario, tmp_path / "home")
    assert len(outcome.connections) == 1


@pytest.mark.usefixtures("acceptor")
@pytest.mark.parametrize("script,seconds,shows", [
    (after_token(hold), "1", FAILED.format("timeout expired")),
    (after_cancel_request(hold), "5", DELIVERED),  # time enough to send the request
], ids=["after-token", "after-request"])
def test_no_answer_within_connect_timeout(old_gss, tmp_path, script, seconds, shows):
    scenario = Scenario("old-gss-silent", "gss", "cancel", options={"connect_timeout": seconds}, script=lambda _: script,
                        shows=shows)
    programs.run_ours(old_gss, scenario, tmp_path / "home")


@pytest.mark.parametrize("run", ["cancel", "request"])
@pytest.mark.parametrize("gssencmode", ["require", "prefer"])
@pytest.mark.parametrize("name,sent", [("removed", []), ("expired", ["GSSENCRequest"])])
def test_tickets_are_lost(old_gss, tickets, tmp_path, name, sent, gssencmode, run):
    loss = LOSSES[name]
    scenario = Scenario("old-gss-lost", "gss", run, options={"gssencmode": gssencmode, "sslmode": "disable"}, environment=CACHE,
                        prepare=lambda directory, _: tickets.realm.kinit(directory / FILE),
                        at_session=lambda directory, _: loss.happens(tickets, directory / FILE),
                        shows=f'-> 0 errno kept, errbuf "PQcancel() -- {loss.says}')
    outcome = programs.run_ours(old_gss, scenario, tmp_path / "home")
    assert [wire.summary(connection) for connection in outcome.connections] == sent


def test_kdc_does_not_answer(old_gss, tickets, tmp_path):
    """Who carries the request then waits, but for no lock of the program's."""
    def fall_silent(directory, *_) -> None:
        shutil.copy(tickets.for_tickets, directory / FILE)
        tickets.realm.kdc.send_signal(signal.SIGSTOP)
    scenario = Scenario("old-gss-kdc-silent", "gss", "cancel", options={"connect_timeout": "2"}, environment=CACHE,
                        prepare=lambda directory, _: tickets.realm.kinit(directory / FILE), at_session=fall_silent,
                        shows=FAILED.format("timeout expired"))
    try:
        programs.run_ours(old_gss, scenario, tmp_path / "home")
    finally:
        tickets.realm.kdc.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("run,calls", [("parents-cancel", 2), ("parents-session", 2), ("own-session", 2), ("grandchild", 3)])
def test_child_cancels(forks, tmp_path, run, calls):
    """A session of the child's own passes through the recording proxy, too: what is counted are cancels."""
    scenario = Scenario("gss-child", "gss", run, script=legacy.real_server, shows="next query: 57014")
    outcome, attempts = run_attempts(forks, scenario, tmp_path / "home")
    assert ("child's query: 57014" if run == "own-session" else "\nquery: 57014") in outcome.transcript
    assert "child: " not in outcome.transcript, outcome.transcript  # it ended well
    assert attempts.delivered == attempts.calls == calls, attempts


def test_parent_and_child_at_once(forks, tmp_path):
    scenario = Scenario("gss-fork", "gss", "at-once", AT_ONCE, script=legacy.real_server)
    outcome, attempts = run_attempts(forks, scenario, tmp_path / "home")
    assert "child: " not in outcome.transcript, outcome.transcript
    assert attempts.delivered == attempts.calls == 2 * AT_ONCE + 1, attempts


def test_fork_while_a_cancel_is_under_way(forks, tmp_path):
    """The child has none of its parent's descriptors but those of before, and cancels by itself."""
    scenario = Scenario("gss-fork", "gss", "in-flight", script=hold_the_first, gates="on", shows="child's descriptors: as before")
    outcome, attempts = run_attempts(forks, scenario, tmp_path / "home")
    assert "child: " not in outcome.transcript, outcome.transcript
    assert (attempts.calls, attempts.delivered) == (3, 2), attempts


@pytest.mark.parametrize("run", ["allocate", "cancelling"])
def test_storm_on_the_wire(storm, tmp_path, run):
    """A handler that cancels interrupts the program wherever it is."""
    scenario = Scenario("gss-storm", "gss", run, SIGNALS, script=legacy.real_server, shows="query: 57014")
    outcome, attempts = run_attempts(storm, scenario, tmp_path / "home")
    check_storm(outcome.transcript, attempts)


def test_storm_while_the_program_connects(storm, realm):
    """It is often inside the very library that the courier needs, and may hold a lock of that: then PQcancel says so. Straight
    to the server, where sessions come and go."""
    server = storm.servers["gss"]
    conninfo = server.conninfo(host="localhost", hostaddr=server.host, gssencmode="require")
    environment = programs.environment(DRIVER_MONITOR=server.conninfo(host=server.socket_dir), **legacy.PATIENT,
                                       **realm.environment)
    result = subprocess.run([storm.build / "driver-pqcancel", conninfo, "connecting", str(SIGNALS)], env=environment,
                            stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, ""), result
    check_storm(result.stdout, legacy.kept_promises(result.stdout))


def check_storm(transcript: str, attempts: legacy.Attempts) -> None:
    assert attempts.calls > SIGNALS and set(attempts.refused) <= {legacy.STUCK}, attempts
    assert attempts.delivered > 0.8 * attempts.calls, attempts
    assert "descriptors: as before" in transcript and "query: 57014" in transcript, transcript


def test_threads_cancel_sessions(threads, tmp_path):
    scenario = Scenario("gss-many", "gss", "many", SESSIONS, sessions=SESSIONS, script=legacy.real_server,
                        shows=f"{SESSIONS} of {SESSIONS} cancelled")
    _, attempts = run_attempts(threads, scenario, tmp_path / "home")
    assert attempts.delivered == attempts.calls == 2 * SESSIONS, attempts


def test_no_descriptor_to_be_had(threads, tmp_path):
    scenario = Scenario("gss-limit", "gss", "no-descriptor", script=legacy.real_server, shows="PQcancel -> 0\n")
    outcome, attempts = run_attempts(threads, scenario, tmp_path / "home")
    assert attempts.refused == {"PQcancel() -- GSSAPI encryption required but no credential cache": 1}, attempts
    assert "with descriptors again: PQcancel -> 1" in outcome.transcript
    assert len(outcome.connections) == 1, "something was sent for the first"
