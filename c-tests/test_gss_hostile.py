"""pqcancel against libpq 18 over GSSAPI: servers that break, lie, hang and attack. The session is genuine; the cancel's server
is not."""

from __future__ import annotations

import struct

import pytest

import gss_scripts
import scripts
from comparison import Scenario, cases, compare
from gss_scripts import after_cancel_request, after_gssenc_request, after_handshake, after_token, with_own_token
from gssapi import framed
from scripts import FORGED_ERROR, close, hold, reset

ENDINGS = {"close": close, "reset": reset, "silence": hold, "fin": gss_scripts.send_fin}
READ_TO_THE_END = ("close", "reset", "silence")
# Where the client is about to write: a server that closed would reset the connection, sooner or later.
ABOUT_TO_WRITE = ("fin", "silence")
OK = "-> OK  status=OK"
FAILED = "status=BAD"
STUCK = "stuck waiting for "
OK_EITHER_WAY = "status=OK"
BLOCKING_OK = "PQcancelBlocking -> 1"
BLOCKING_FAILED = "PQcancelBlocking -> 0"
NO_CONTEXT = "could not initiate GSSAPI security context"

# libpq's PQ_GSS_AUTH_BUFFER_SIZE and PQ_GSS_MAX_PACKET_SIZE, without the length.
LARGEST_TOKEN = 65536 - 4
LARGEST_PACKET = 16384 - 4


def length(size: int) -> bytes:
    return struct.pack("!I", size)


def both_ways(name, shows_polled, shows_blocking, script, **rest):
    """The same scenario polled and blocking."""
    return [Scenario(name, "gss", "polled", shows=shows_polled, script=lambda _: script, **rest),
            Scenario(name, "gss", "blocking", shows=shows_blocking, script=lambda _: script, **{"only_host": "system", **rest})]


def every_ending(name, script_with, closed=FAILED, endings=READ_TO_THE_END):
    """The same script with each ending. A close may be what the client waits for."""
    found = []
    for how in endings:
        shows = STUCK if how == "silence" else closed if how == "close" else FAILED
        script = script_with(ENDINGS[how])
        found.append(Scenario(f"{name}-then-{how}", "gss", shows=shows, script=lambda _, script=script: script))
        if how != "silence":
            found.append(Scenario(f"{name}-then-{how}", "gss", "blocking", shows=shows, script=lambda _, script=script: script,
                                  only_host="system"))
    return found


def in_the_librarys_words(name, shows, script):
    """Of the same library, as libpq 18 uses it; and of Debian's, whose words are others."""
    return (both_ways(name, shows, BLOCKING_FAILED, script, only_host="18") +
            both_ways(f"{name}-in-other-words", shows, BLOCKING_FAILED, script, only_host="system"))


def ended_at_gates(*gates):
    """The server closes or resets before a certain poll. What follows is certain, whatever the timing."""
    before = {"made-gss": after_handshake(lambda _: None), "awaiting": after_cancel_request(lambda _: None)}
    return [Scenario(f"{how}-at-{gate}", "gss", gates=gate, script=lambda _, gate=gate, how=how:
                     scripts.at_gate(gate, ENDINGS[how], before.get(gate)))
            for gate in gates for how in ("close", "reset")]


def answers_to_gssenc_request():
    """What a server may say instead of a plain 'G'."""
    found = []
    for name, answer, shows in (
            ("N", b"N", "server doesn't support GSSAPI encryption, but it was required"),
            ("E", FORGED_ERROR, "server sent an error response during GSS encryption exchange"),
            ("lone-E", b"E", "server sent an error response during GSS encryption exchange"),
            ("S", b"S", "received invalid response to GSSAPI negotiation: S"),
            ("zero", b"\0", "received invalid response to GSSAPI negotiation: "),
            ("text", b"HTTP/1.1 400 Bad Request\r\n\r\n", "received invalid response to GSSAPI negotiation: H")):
        found += both_ways(f"answer-{name}", shows, BLOCKING_FAILED, after_gssenc_request(hold, answer))
    for name, extra in (("byte", b"x"), ("error", FORGED_ERROR), ("many", b"x" * 4000), ("token", framed(b"\x60token"))):
        found += both_ways(f"bytes-with-G-{name}", "received unencrypted data after GSSAPI encryption response",
                           BLOCKING_FAILED, with_own_token(bytes, hold, before=extra))
        found += every_ending(f"bytes-with-G-{name}", lambda ending, extra=extra: after_gssenc_request(ending, b"G" + extra),
                              endings=ABOUT_TO_WRITE)
    found += every_ending("GSSENCRequest", after_gssenc_request)
    found += every_ending("G", lambda ending: after_gssenc_request(ending, b"G"), endings=ABOUT_TO_WRITE)
    return found + ended_at_gates("started", "made")


def tokens():
    """What a server may answer to the client's token instead of its own."""
    found = []
    for name, answer, shows in (
            ("oversized", length(LARGEST_TOKEN + 1), "oversize GSSAPI packet sent by the server (65533 > 65532)"),
            ("enormous", length(2**32 - 1), "oversize GSSAPI packet sent by the server (4294967295 > 65532)"),
            ("text", b"HTTP/1.1 400 Bad Request\r\n\r\n", "oversize GSSAPI packet sent by the server (1213486160 > 65532)"),
            ("error", FORGED_ERROR, FAILED),
            ("error-in-words", b"Eforged text\0", "")):
        found += both_ways(f"token-{name}", shows, BLOCKING_FAILED, after_token(hold, answer))
    for name, token in (("garbage", bytes(range(256))), ("packet", b"\x05\x04\x07\xff" + bytes(60)),
                        ("largest", b"x" * LARGEST_TOKEN)):
        found += in_the_librarys_words(f"token-{name}", f"{NO_CONTEXT}: Invalid token was supplied",
                                       after_token(hold, framed(token)))
    found += every_ending("no-token", after_token)
    found += every_ending("token-lone-E", lambda ending: after_token(ending, b"E"))
    found += every_ending("empty-token", lambda ending: after_token(ending, length(0)))
    for size in (2, 4, 50):
        found += every_ending(f"token-{size}-bytes", lambda ending, size=size:
                              with_own_token(lambda token: token[:size], ending))
    found += both_ways("token-changed", NO_CONTEXT, BLOCKING_FAILED,
                       with_own_token(lambda token: token[:-1] + bytes([token[-1] ^ 1]), hold))
    found += every_ending("unasked-byte", lambda ending: with_own_token(lambda token: token + b"x", ending, takes_request=True),
                          endings=("silence",))
    found += both_ways("unasked-text", "oversize GSSAPI packet sent by the server", BLOCKING_FAILED,
                       with_own_token(lambda token: token + b"text", hold, takes_request=True))
    found += both_ways("token-in-pieces", OK, BLOCKING_OK, gss_scripts.in_pieces(1, 1, 1, 1, 1, 50, 100))
    return found


def requests():
    """From the context on."""
    found = ended_at_gates("made-gss", "awaiting")
    found += [Scenario("handshake-then-silence", "gss", shows=STUCK, script=lambda _: after_handshake(hold))]
    found += [Scenario("request-then-silence", "gss", shows=STUCK, script=lambda _: after_cancel_request(hold))]
    found += both_ways("request-then-close", OK, BLOCKING_OK, after_cancel_request(close))
    found += both_ways("request-then-reset", FAILED, BLOCKING_FAILED, after_cancel_request(reset))
    for name, answer, shows in (
            ("byte", lambda server: server.write(b"N"), "unexpected response from server"),
            ("error", lambda server: server.write(FORGED_ERROR), "unexpected response from server"),
            ("many", lambda server: server.write(b"x" * 16000), "unexpected response from server"),
            ("confidential-to-nobody", lambda server: server.write(b"N", confidential=False),
             "incoming GSSAPI message did not use confidentiality"),
            ("garbage", lambda server: server.connection.send(framed(bytes(100))), "GSSAPI unwrap error"),
            ("largest", lambda server: server.connection.send(framed(bytes(LARGEST_PACKET))), "GSSAPI unwrap error"),
            ("oversized", lambda server: server.connection.send(length(LARGEST_PACKET + 1)),
             "oversize GSSAPI packet sent by the server (16381 > 16380)"),
            ("in-the-clear", lambda server: server.connection.send(FORGED_ERROR),
             "oversize GSSAPI packet sent by the server (1157627904 > 16380)")):
        found += both_ways(f"answered-{name}", shows, BLOCKING_FAILED, after_cancel_request(hold, answer))
    for name, answer in (("half-a-length", b"\0\0"), ("empty-packet", length(0)), ("half-a-packet", length(60) + bytes(30))):
        found += every_ending(f"answered-{name}", lambda ending, answer=answer:
                              after_cancel_request(ending, lambda server: server.connection.send(answer)), closed=OK_EITHER_WAY)
    found += every_ending("answered-nothing-in-a-packet", lambda ending:
                          after_cancel_request(ending, lambda server: server.write(b"")), closed=OK_EITHER_WAY)
    return found


def timeouts():
    """connect_timeout holds for PQcancelBlocking, also in the middle of a token."""
    half = with_own_token(lambda token: token[:50], hold)
    return [Scenario("timeout-after-half-a-token", "gss", "timed", options={"connect_timeout": "1"}, script=lambda _: half,
                     shows="timeout expired", only_host="system")]


def refused():
    """gssencmode=prefer: libpq 18 takes the next best way."""
    next_best = {"disable": "CancelRequest of 16 bytes in the clear", "prefer": "SSLRequest, ClientHello("}
    return [Scenario(f"gss-refused-{name}-{sslmode}", "gss", run, options={"gssencmode": "prefer", "sslmode": sslmode},
                     script=lambda _, answer=answer: gss_scripts.refuse_but_serve(answer), shows=shows, only_host="system")
            for name, answer in (("N", b"N"), ("E", FORGED_ERROR)) for run in ("polled", "blocking")
            for sslmode, shows in next_best.items()]


SCENARIOS = [*answers_to_gssenc_request(), *tokens(), *requests(), *refused(), *timeouts()]


@pytest.mark.usefixtures("acceptor")
@pytest.mark.parametrize("scenario,host", cases(SCENARIOS))
def test_same_as_libpq18(gss, tmp_path, scenario, host):
    compare(gss, scenario, tmp_path / "home", host)
