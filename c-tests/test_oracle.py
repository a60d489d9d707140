"""pqcancel against libpq 18: the life of a PGcancelConn, over every transport and a real server."""

from __future__ import annotations

import pytest

from comparison import TRANSPORTS, Scenario, cases, compare

EVERY_TRANSPORT = [name for name in TRANSPORTS if name not in ("plain18", "tls6", "gss")]

# Driver scenarios, how often, and what libpq 18 must show.
LIFE = [
    ("blocking", 0, "PQcancelBlocking -> 1  status=OK"),
    ("polled", 0, "PQcancelPoll -> OK  status=OK"),
    ("polled-too-early", 0, "PQcancelPoll (last) -> OK"),
    ("cycles", 20, "descriptors: +0"),
    ("objects", 20, "descriptors: +0"),
    ("mixed-resets", 0, "ended=1 descriptors: +0"),
    ("finish-in-flight", 0, "ended=1 descriptors: +0"),
    ("start-twice", 0, "cancel request is already being sent on this connection"),
    ("start-again", 0, "cancel request is already being sent on this connection"),
    ("poll-before-start", 0, "invalid connection state, probably indicative of memory corruption"),
    ("poll-after-end", 0, "again\nPQcancelPoll -> OK"),
    ("half-open-session", 0, "no cancellation key received"),
    ("two-objects", 0, "PQcancelPoll -> OK  status=OK"),
    ("session-finished", 0, "PQcancelPoll -> OK  status=OK"),
    ("many-descriptors", 0, "PQcancelPoll -> OK  status=OK"),
    ("closed-session", 0, "connection not open"),
    ("query", 0, "SQLSTATE 57014\nnext query: 42"),
    ("query", 1, "SQLSTATE 57014\nnext query: 42"),
]

SCENARIOS = [Scenario("life", transport, run, number, shows=shows) for transport in EVERY_TRANSPORT
             for run, number, shows in LIFE]
SCENARIOS += [
    Scenario("life", transport, "bad-session", sessions=2, shows="session: bad options, status not OK")
    for transport in EVERY_TRANSPORT
]
SCENARIOS += [
    Scenario("life", "tcp4", "null", shows="connection pointer is NULL"),
    Scenario("life", "tcp4", "reset-bad", shows="PQcancelReset -> void  status=ALLOCATED"),
    Scenario("null-poll-and-reset", "tcp4", "null-poll-and-reset"),
    Scenario("life", "tcp4", "cycles", 1000, shows="descriptors: +0"),
    Scenario("life", "tls15", "cycles", 1000, shows="descriptors: +0", only_host="system"),
    # Protocol 3.2: a cancel key of 32 bytes.
    Scenario("long-key", "plain18", "query", 1, options={"max_protocol_version": "latest"},
             shows="CancelRequest of 44 bytes in the clear"),
    Scenario("long-key", "tls18", "query", 1, options={"max_protocol_version": "latest"}, shows="SQLSTATE 57014"),
]


@pytest.mark.parametrize("scenario,host", cases(SCENARIOS))
def test_same_as_libpq18(laboratory, tmp_path, scenario, host):
    compare(laboratory, scenario, tmp_path / "home", host)
