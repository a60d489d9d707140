"""pqcancel against libpq 18: servers that break, lie, hang and attack. The session is genuine, the cancel is not."""

from __future__ import annotations

import pytest

import scripts
from comparison import Scenario, cases, compare
from scripts import FORGED_ERROR, close, hold, reset, tls_context

ENDINGS = {"close": close, "reset": reset}
OK = "-> OK  status=OK"
FAILED = "status=BAD"
STUCK = "stuck waiting for "
BLOCKING_OK = "PQcancelBlocking -> 1"
BLOCKING_FAILED = "PQcancelBlocking -> 0"

# The first bytes of a server's flight: inside the record's header, inside the ServerHello, inside what is encrypted.
FLIGHT_SIZES = (3, 40, 300)


def good(certs):
    return tls_context(certs, certs.server)


def both_ways(name, transport, shows_polled, shows_blocking, **rest):
    """The same scenario polled and blocking."""
    return [Scenario(name, transport, "polled", shows=shows_polled, **rest),
            Scenario(name, transport, "blocking", shows=shows_blocking, **rest)]


def ended_at_gates(transport, gates):
    """The server closes or resets before a certain poll. What follows is certain, whatever the timing."""
    return [Scenario(f"{name}-at-{gate}", transport, gates=gate,
                     script=lambda c, gate=gate, ending=ending: scripts.at_gate(gate, ending))
            for gate in gates for name, ending in ENDINGS.items()]


def plain(transport):
    """A server without TLS."""
    # A connect to a Unix socket is never under way.
    found = ended_at_gates(transport, ("made",) if transport == "unix" else ("started", "made"))
    for name, ending in ENDINGS.items():
        found.append(Scenario(f"{name}-at-awaiting", transport, gates="awaiting", script=lambda c, ending=ending:
                              scripts.at_gate("awaiting", ending, lambda connection: connection.receive_packet())))
    for name, answer in (("one-byte", b"N"), ("error", FORGED_ERROR), ("many-bytes", b"x" * 20000)):
        found += both_ways(f"answered-{name}", transport, "unexpected response from server", BLOCKING_FAILED,
                           script=lambda c, answer=answer: scripts.after_cancel_request(hold, answer))
    found += both_ways("request-then-close", transport, OK, BLOCKING_OK,
                       script=lambda c: scripts.after_cancel_request(close))
    found += both_ways("request-then-reset", transport, FAILED if "tcp" in transport else "", "",
                       script=lambda c: scripts.after_cancel_request(reset))
    found += [Scenario("silence-at-once", transport, shows=STUCK, script=lambda c: hold),
              Scenario("silence-after-request", transport, shows=STUCK,
                       script=lambda c: scripts.after_cancel_request(hold))]
    return found


def unreachable(transport):
    """Nobody listens any more, or nobody takes the connection."""
    found = both_ways("refused", transport, "Connection refused", "Connection refused", between=scripts.nobody_listens)
    for run in ("start-again", "poll-after-end"):
        found.append(Scenario("refused", transport, run, shows="Connection refused", between=scripts.nobody_listens))
    if transport == "unix":
        found += both_ways("removed", transport, "No such file or directory", BLOCKING_FAILED,
                           between=scripts.socket_removed)
    if transport in ("unix", "abstract"):
        found += both_ways("queue-full", transport, "Resource temporarily unavailable", BLOCKING_FAILED,
                           between=scripts.queue_full)
    else:
        found.append(Scenario("queue-full", transport, shows=STUCK, between=scripts.queue_full))
    return found


def answers_to_ssl_request():
    """What a server may say instead of a plain 'S'."""
    transport, found = "tls15", []
    found += both_ways("answer-N", transport, "server does not support SSL, but SSL was required", BLOCKING_FAILED,
                       script=lambda c: scripts.refuse_tls_but_listen)
    for mode in ("prefer", "require"):
        found += both_ways(f"answer-N-{mode}", transport, "", "", script=lambda c: scripts.refuse_tls_but_listen,
                           options={"sslmode": mode, "sslrootcert": "{dir}/missing"})
    for name, answer in (("E", FORGED_ERROR), ("lone-E", b"E"), ("unknown", b"X"), ("zero", b"\0")):
        found += both_ways(f"answer-{name}", transport, FAILED, BLOCKING_FAILED,
                           script=lambda c, answer=answer: scripts.after_ssl_request(hold, answer))
    for name, extra in (("byte", b"x"), ("error", FORGED_ERROR), ("many", b"x" * 4000)):
        found += both_ways(f"bytes-before-handshake-{name}", transport, "received unencrypted data after SSL response",
                           BLOCKING_FAILED, script=lambda c, extra=extra: scripts.bytes_before_handshake(good(c), extra))
        found += both_ways(f"S-and-{name}-then-close", transport, FAILED, BLOCKING_FAILED,
                           script=lambda c, extra=extra: scripts.bytes_instead_of_handshake(extra))
    found += ended_at_gates(transport, ("started", "made"))
    for name, ending in {**ENDINGS, "silence": hold}.items():
        shows = STUCK if ending is hold else FAILED
        found.append(Scenario(f"{name}-after-SSLRequest", transport, shows=shows,
                              script=lambda c, ending=ending: scripts.after_ssl_request(ending)))
        if ending is not hold:
            found.append(Scenario(f"{name}-after-SSLRequest", transport, "blocking", shows=BLOCKING_FAILED,
                                  script=lambda c, ending=ending: scripts.after_ssl_request(ending)))
    return found


def broken_handshakes(transport, start):
    found = []
    not_tls = {"text": b"HTTP/1.1 400 Bad Request\r\n\r\n", "garbage": bytes(range(0x80, 0x100)) * 4, "error": FORGED_ERROR,
               "alert": bytes.fromhex("15030300020228")}
    for name, answer in not_tls.items():
        found += both_ways(f"not-TLS-{name}", transport, FAILED, BLOCKING_FAILED,
                           script=lambda c, answer=answer: scripts.after_client_hello(start, hold, answer))
    for name, ending in {**ENDINGS, "silence": hold}.items():
        shows = STUCK if ending is hold else FAILED
        found.append(Scenario(f"{name}-after-ClientHello", transport, shows=shows,
                              script=lambda c, ending=ending: scripts.after_client_hello(start, ending)))
        for size in FLIGHT_SIZES:
            found.append(Scenario(f"{name}-after-{size}-bytes", transport, shows=shows, script=lambda c, ending=ending, size=size:
                                  scripts.in_server_flight(start, good(c), size, ending)))
    found += both_ways("TLS-too-old", transport, FAILED, BLOCKING_FAILED, script=lambda c:
                       scripts.after_tls_cancel_request(start, tls_context(c, c.server, too_old=True), close))
    no_alpn = FAILED if start == "direct" else OK
    found.append(Scenario("no-ALPN", transport, shows=no_alpn, script=lambda c: scripts.after_tls_cancel_request(
        start, tls_context(c, c.server, alpn=False), close, close_notify=True)))
    return found


def after_the_handshake(transport, start):
    found = []
    for name, ending in ENDINGS.items():
        found.append(Scenario(f"{name}-at-made-tls", transport, gates="made-tls", script=lambda c, ending=ending:
                              scripts.at_gate("made-tls", ending, scripts.after_handshake(start, good(c), lambda _: None))))
    found.append(Scenario("silence-after-handshake", transport, shows=STUCK,
                          script=lambda c: scripts.after_handshake(start, good(c), hold)))
    found.append(Scenario("silence-after-request", transport, shows=STUCK,
                          script=lambda c: scripts.after_tls_cancel_request(start, good(c), hold)))
    found += both_ways("close-notify", transport, OK, BLOCKING_OK, script=lambda c:
                       scripts.after_tls_cancel_request(start, good(c), close, close_notify=True))
    found += both_ways("close-notify-and-nothing-more", transport, OK, BLOCKING_OK, script=lambda c:
                       scripts.after_tls_cancel_request(start, good(c), hold, close_notify=True))
    found += both_ways("bare-eof", transport, "", "", script=lambda c:
                       scripts.after_tls_cancel_request(start, good(c), close))
    found += both_ways("request-then-reset", transport, FAILED, BLOCKING_FAILED, script=lambda c:
                       scripts.after_tls_cancel_request(start, good(c), reset))
    for name, answer in (("one-byte", b"N"), ("error", FORGED_ERROR), ("many-bytes", b"x" * 20000)):
        found += both_ways(f"answered-{name}", transport, "unexpected response from server", BLOCKING_FAILED,
                           script=lambda c, answer=answer: scripts.after_tls_cancel_request(start, good(c), hold, answer))
    return found


def timeouts():
    """connect_timeout holds for PQcancelBlocking, wherever the server falls silent."""
    one, found = {"connect_timeout": "1"}, []

    def silent(name, transport, script):
        found.append(Scenario(f"timeout-{name}", transport, "timed", options=one, script=script, only_host="system",
                              shows="timeout expired"))

    silent("at-once", "tls15", lambda c: scripts.after_ssl_request(hold))
    silent("after-S", "tls15", lambda c: scripts.after_ssl_request(hold, b"S"))
    silent("after-40-bytes", "tls15", lambda c: scripts.in_server_flight("tls", good(c), 40, hold))
    silent("after-handshake", "tls15", lambda c: scripts.after_handshake("tls", good(c), hold))
    silent("after-request", "tls15", lambda c: scripts.after_tls_cancel_request("tls", good(c), hold))
    silent("after-request", "tcp4", lambda c: scripts.after_cancel_request(hold))
    silent("after-request", "unix", lambda c: scripts.after_cancel_request(hold))
    found.append(Scenario("timeout-connecting", "tcp4", "timed", options=one, between=scripts.queue_full,
                          shows="timeout expired", only_host="system"))
    # None: however late the server closes, it is a success.
    for name, value in (("zero", "0"), ("negative", "-1")):
        found.append(Scenario(f"timeout-{name}", "tcp4", "timed", options={"connect_timeout": value}, only_host="system",
                              gates="for-ever", script=lambda c: scripts.close_when_waited_for_ever, shows="waits for ever"))
    found.append(Scenario("timeout-two", "tcp4", "timed", options={"connect_timeout": "2"}, only_host="system",
                          script=lambda c: scripts.after_cancel_request(hold), shows="waited: 2000 ms"))
    for value in ("soon", "1x", "99999999999", ""):
        found.append(Scenario(f"timeout-{value or 'empty'}", "tcp4", "timed", options={"connect_timeout": value}))
    # Polling has no timeout: it is the caller's affair.
    found.append(Scenario("timeout-is-not-polled", "tcp4", options={"connect_timeout": "soon"}, shows=OK))
    return found


SCENARIOS = [
    *(scenario for transport in ("tcp4", "unix") for scenario in plain(transport)),
    *(scenario for transport in ("tcp4", "tcp6", "unix", "abstract", "tls15") for scenario in unreachable(transport)),
    *answers_to_ssl_request(),
    *(scenario for transport, start in (("tls15", "tls"), ("direct18", "direct"))
      for scenario in broken_handshakes(transport, start) + after_the_handshake(transport, start)),
    *timeouts(),
]


@pytest.mark.parametrize("scenario,host", cases(SCENARIOS))
def test_same_as_libpq18(laboratory, tmp_path, scenario, host):
    compare(laboratory, scenario, tmp_path / "home", host)
