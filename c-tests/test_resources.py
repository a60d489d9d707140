"""A good guest: what the process has is as before, whatever becomes of a cancel."""

from __future__ import annotations

import errno
import re
import socket
import subprocess
from dataclasses import replace

import pytest

import programs
import scripts
from comparison import Scenario, compare
from hostile import SSL_REQUEST, CancelConnection, TlsServer
from legacy import SLACK
from programs import always_closed
from scripts import FORGED_ERROR, close, reset, tls_context

CYCLES = 1000
CYCLES_TLS = 200  # each takes a handshake in Python
MEMORY_CYCLES = 5000
NO_CACHE = "glibc.malloc.tcache_count=0"  # or what a thread keeps for later would count as allocated


@pytest.fixture(scope="module")
def guest(certs, servers):
    """As `laboratory`, with guest.c in the driver's place."""
    yield from programs.open_laboratory(programs.build_guest(), certs, servers)


def fin_then_reset(connection: CancelConnection) -> None:
    """The order after which a write not only fails but raises SIGPIPE, also over TCP."""
    connection.sock.shutdown(socket.SHUT_WR)
    connection.reset()


def after_flight(certs, ending, **changes):
    context = tls_context(certs, certs.server, **changes)
    return scripts.after_tls_cancel_request("tls", context, ending)


# How a cancel can fail, or succeed (None: the real server), by name: transport, script.
WAYS = {
    "success": ("tcp4", None),
    "success-unix": ("unix", None),
    "success-tls": ("tls15", None),
    "reset-at-once": ("tcp4", lambda c: reset),
    "answered": ("tcp4", lambda c: scripts.after_cancel_request(close, b"N")),
    "answer-N": ("tls15", lambda c: scripts.after_ssl_request(close, b"N")),
    "answer-E": ("tls15", lambda c: scripts.after_ssl_request(close, FORGED_ERROR)),
    "answer-garbage": ("tls15", lambda c: scripts.after_ssl_request(close, b"garbage")),
    "reset-after-request": ("tls15", lambda c: scripts.after_ssl_request(reset)),
    "not-TLS": ("tls15", lambda c: scripts.after_client_hello("tls", close, bytes(range(256)))),
    "half-a-flight": ("tls15", lambda c: scripts.in_server_flight("tls", tls_context(c, c.server), 300, reset)),
    "wrong-CA": ("tls15", scripts.with_certificate("other_server")),
    "wrong-name": ("tls15", scripts.with_certificate("wrong_name")),
    "expired": ("tls15", scripts.with_certificate("expired")),
    "TLS-too-old": ("tls15", lambda c: after_flight(c, close, too_old=True)),
    "answered-in-TLS": ("tls15", lambda c: scripts.after_tls_cancel_request(
        "tls", tls_context(c, c.server), close, FORGED_ERROR)),
    "reset-in-TLS": ("tls15", lambda c: after_flight(c, reset)),
}


def scenario_of(way: str, run: str, number: int = 0, **rest) -> Scenario:
    transport, script = WAYS[way]
    wrapped = (lambda c: always_closed(script(c))) if script else (lambda c: always_closed(CancelConnection.pass_through))
    return Scenario(way, transport, run, number, script=wrapped, **rest)


def delivered(way: str) -> str:
    """After these a blocking or polled cancel tells success; after all others failure."""
    return "all" if way.startswith("success") else "none"


@pytest.mark.parametrize("way", WAYS)
def test_descriptors_stay_as_before(guest, tmp_path, way):
    cycles = CYCLES_TLS if WAYS[way][0] == "tls15" else CYCLES
    shows = f"{cycles} cycles, {delivered(way)} delivered, descriptors: as before"
    programs.run_ours(guest, scenario_of(way, "descriptors", cycles, shows=shows), tmp_path / "home")


def test_descriptors_stay_as_before_when_refused(guest, tmp_path):
    for transport in ("tcp4", "unix"):
        shows = "1000 cycles, none delivered, descriptors: as before"
        scenario = Scenario("refused", transport, "descriptors", CYCLES, between=scripts.nobody_listens, shows=shows)
        programs.run_ours(guest, scenario, tmp_path / "home")


NO_SOCKET = 'PQcancelStart -> 0  status=BAD socket=-1 error="{}'
GOOD_AGAIN = ("PQcancelReset -> void  status=ALLOCATED socket=-1 error=\"\"\nPQcancelBlocking -> 1  status=OK",
              "PQcancelPoll -> OK  status=OK socket=-1 error=\"\"\nPQcancelFinish")


@pytest.mark.parametrize("transport", ["tcp4", "unix", "tls15"])
def test_no_descriptor_left(guest, tmp_path, transport):
    """A wilful difference: libpq 18 means to say this, but fails without a word (it believes in a next address)."""
    scenario = Scenario("no-descriptor", transport, "exhausted", 0, shows="could not create socket: Too many open files")
    ours = programs.run_ours(guest, scenario, tmp_path / "home").transcript
    theirs = guest.over_libpq18(scenario, tmp_path / "home").transcript
    assert NO_SOCKET.format('"') in theirs, theirs
    assert NO_SOCKET.format("connection to server ") in ours, ours
    assert without_messages(theirs) == without_messages(ours)
    assert all(text in ours for text in GOOD_AGAIN), ours


def without_messages(transcript: str) -> str:
    return re.sub(r'error=".*"', "", transcript)


@pytest.mark.parametrize("transport", ["tcp4", "unix"])
def test_one_descriptor_left(guest, tmp_path, transport):
    """The socket is all that a cancel without TLS needs. That another one fails has no effect on it."""
    scenario = Scenario("one-descriptor", transport, "exhausted", 1, shows=GOOD_AGAIN[1])
    compare(guest, scenario, tmp_path / "home", "system")


def test_no_descriptor_for_the_root_certificate(guest, tmp_path):
    """A wilful difference: libpq 18 shows bytes at random here, and the object never works again. (With a directory of
    revocation lists, because only then the file is not read ahead.)"""
    scenario = Scenario("one-descriptor", "tls15", "exhausted", 1, options={"sslcrldir": "{c.crl_dir}"},
                        shows="could not read root certificate file")
    transcript = programs.run_ours(guest, scenario, tmp_path / "home").transcript
    assert re.search(r'PQcancelPoll -> FAILED .*ca\.crt\\": Too many open files', transcript), transcript
    assert all(text in transcript for text in GOOD_AGAIN), transcript


def test_neither_memory_nor_descriptors_grow(guest, servers, certs):
    """Straight to the server: 5,000 cancels in four ways, the fourth given up in mid-flight. Both kinds side by side."""
    running = {}
    for sslmode in ("disable", "verify-full"):
        conninfo = servers["15"].conninfo(host="localhost", hostaddr="127.0.0.1", sslmode=sslmode, sslrootcert=certs.ca)
        running[sslmode] = subprocess.Popen([guest.build / "driver-pqcancel", conninfo, "memory", str(MEMORY_CYCLES)],
                                            env=programs.environment(GLIBC_TUNABLES=NO_CACHE), stdout=subprocess.PIPE,
                                            stderr=subprocess.PIPE, text=True)
    outputs = {sslmode: process.communicate() for sslmode, process in running.items()}  # each has a watchdog of its own
    for sslmode, (output, errors) in outputs.items():
        assert (running[sslmode].returncode, errors) == (0, ""), (sslmode, output, errors)
        allocated, resident = (int(re.search(rf"{what}: ([+-]\d+)", output).group(1)) for what in ("allocated", "resident"))
        print(f"{sslmode}: {MEMORY_CYCLES} cancels: {allocated:+d} bytes allocated, {resident:+d} kB resident")
        assert allocated < MEMORY_CYCLES, (sslmode, output)  # a leak of one byte a cancel would show
        assert resident < 512, (sslmode, output)
        assert "descriptors: as before" in output, sslmode


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EINTR, errno.EINPROGRESS, errno.ENOMEM, 0])
@pytest.mark.parametrize("transport", ["tcp4", "unix", "tls15"])
def test_errno_before_a_call_does_not_matter(guest, tmp_path, transport, number):
    scenario = Scenario("errno", transport, "errno", number, shows="PQcancelBlocking -> 1  status=OK")
    compare(guest, scenario, tmp_path / "home", "system")


@pytest.mark.parametrize("way", WAYS)
def test_the_process_is_as_before(guest, tmp_path, way):
    scenario = scenario_of(way, "state", shows=f"delivered: {delivered(way)}\nstate: as before")
    programs.run_ours(guest, scenario, tmp_path / "home")


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_printed(guest, tmp_path, way):
    scenario = scenario_of(way, "quiet", shows=f"delivered: {delivered(way)}, written: 0 bytes")
    programs.run_ours(guest, scenario, tmp_path / "home")


@pytest.mark.parametrize("transport", ["tcp4", "unix", "tls15"])
def test_interrupted_by_signals(guest, tmp_path, transport):
    scenario = Scenario("interrupted", transport, "interrupted", 100, shows='PQcancelBlocking -> 1 error=""\nelapsed')
    outcome = programs.run_ours(guest, scenario, tmp_path / "home")
    assert outcome.transcript.count("PQcancelBlocking") == 1, outcome.transcript  # all were the same


def test_a_timeout_holds_although_signals_interrupt(guest, tmp_path):
    scenario = Scenario("interrupted-timeout", "tcp4", "interrupted", 1, options={"connect_timeout": "2"},
                        script=lambda c: scripts.after_cancel_request(scripts.hold), shows="timeout expired")
    outcome = programs.run_ours(guest, scenario, tmp_path / "home")
    elapsed = int(re.search(r"^elapsed: (\d+) s$", outcome.transcript, re.MULTILINE).group(1))
    assert 2 <= elapsed < 2 + SLACK, outcome.transcript


def flight_and_gone(context):
    """The server's whole flight, and it is gone: what the client answers, if only an alert, finds nobody."""
    def script(connection: CancelConnection) -> None:
        scripts.begin(connection, "tls")
        flight = TlsServer(connection, context).first_flight()
        connection.run.at_gate("hello-sent", lambda: (connection.send(flight), fin_then_reset(connection)))
    return script


GONE = {
    "before-the-request": ("made", lambda c: scripts.at_gate("made", fin_then_reset)),
    "before-the-request-in-TLS": ("made-tls", lambda c: scripts.at_gate("made-tls", fin_then_reset, scripts.after_handshake(
        "tls", tls_context(c, c.server), lambda _: None))),
    "before-the-handshake-ends": ("hello-sent", lambda c: flight_and_gone(tls_context(c, c.server))),
    "before-the-alert": ("hello-sent", lambda c: flight_and_gone(tls_context(c, c.other_server))),
}


@pytest.mark.parametrize("transport,gone", [("tcp4", "before-the-request"), ("unix", "before-the-request"),
                                            ("tls15", "before-the-request-in-TLS"), ("tls15", "before-the-handshake-ends"),
                                            ("tls15", "before-the-alert")])
def test_no_sigpipe(laboratory, tmp_path, transport, gone):
    """The driver leaves SIGPIPE at its default, which is death."""
    gates, script = GONE[gone]
    scenario = Scenario("sigpipe", transport, gates=gates, script=script, shows="status=BAD")
    programs.run_ours(laboratory, scenario, tmp_path / "home")


@pytest.mark.parametrize("transport", ["tcp4", "unix"])
def test_a_careless_write_there_is_death(guest, tmp_path, transport):
    """Control experiment for test_no_sigpipe."""
    scenario = Scenario("careless", transport, "careless-write", gates="made", script=GONE["before-the-request"][1])
    outcome = guest.over_pqcancel(scenario, tmp_path / "home", "system")
    assert "exit status -13" in outcome.transcript, outcome


def test_descriptors_above_1024_and_a_timeout(laboratory, tmp_path):
    """poll(2) and not select(2), also where there is a time limit to keep."""
    scenario = Scenario("above-1024", "tcp4", "many-descriptors", options={"connect_timeout": "2"},
                        script=lambda c: scripts.after_cancel_request(scripts.hold), shows="timeout expired")
    programs.run_ours(laboratory, replace(scenario, only_host="system"), tmp_path / "home")


def test_the_server_sees_what_the_names_say(guest, tmp_path):
    """Control experiment for the table above: over TLS the script's server was really asked for TLS."""
    outcome = programs.run_ours(guest, scenario_of("answer-N", "quiet"), tmp_path / "home")
    assert outcome.connections and all(c.sent_by_client in (SSL_REQUEST, b"") for c in outcome.connections)
