"""PQgetCancel, PQcancel, PQfreeCancel and PQrequestCancel against libpq 18: what callers see of them is the same, and of a
session over TLS nothing is readable any more."""

from __future__ import annotations

import pytest

import peers
import programs
import scripts
from comparison import TRANSPORTS, Scenario, cases, compare
from programs import always_closed
from scripts import FORGED_ERROR, close, reset, tls_context

PLAINTEXT = ["tcp4", "tcp6", "unix", "abstract", "plain18"]
TLS = ["tls15", "tls18", "direct18"]


DELIVERED = 'PQcancel -> 1 errno kept, errbuf "####"'

# Scenarios of old_functions.c, how often, and what libpq 18 must show.
LIFE = [
    ("cancel", 0, DELIVERED),
    ("often", 20, "descriptors: +0"),
    ("query", 0, "SQLSTATE 57014\nnext query: 42"),
    ("query", 1, "PQrequestCancel -> 1\nresult: SQLSTATE 57014\nnext query: 42"),
    ("request", 0, "PQrequestCancel -> 1"),
    ("half-open", 0, "PQcancel() -- no cancellation key received"),
    ("closed", 0, "PQgetCancel -> NULL\nPQrequestCancel -> 0, \"PQrequestCancel() -- connection is not open"),
]
SCENARIOS = [Scenario("old", transport, run, number, shows=shows) for transport in PLAINTEXT for run, number, shows in LIFE]
# Over TLS the callers see the same; what differs is on the wire, and that is the point.
SCENARIOS += [Scenario("old-tls" if sends else "old", transport, run, number, shows=shows) for transport in TLS
              for run, number, shows in LIFE for sends in [run not in ("half-open", "closed")]]
SCENARIOS += [Scenario("old", "tcp4", "null", shows="PQcancel() -- no cancel object supplied")]

# Nobody listens any more: the one message with a number that is easily had.
REFUSED = r'PQcancel() -- connect() failed: error 111\n'
SCENARIOS += [Scenario("old-refused", transport, run, between=scripts.nobody_listens, shows=REFUSED)
              for transport in ("tcp4", "tcp6", "tls15", "direct18") for run in ("cancel", "request")]
SCENARIOS += [Scenario("old-refused", "tcp4", "sizes", between=scripts.nobody_listens, shows=REFUSED)]

# libpq reads whatever comes, or how it ends, as success, once the request is sent.
ENDINGS = {"close": lambda c: scripts.after_cancel_request(close), "reset": lambda c: scripts.after_cancel_request(reset),
           "answer": lambda c: scripts.after_cancel_request(close, b"N")}
SCENARIOS += [Scenario(f"old-{name}", transport, "cancel", script=script, shows=DELIVERED)
              for name, script in ENDINGS.items() for transport in ("tcp4", "unix")]

# Options of the session that the socket of PQcancel gets.
KEEPALIVES = {"keepalives_idle": "7", "keepalives_interval": "3", "keepalives_count": "2", "tcp_user_timeout": "5000"}
SCENARIOS += [Scenario(f"old-keepalives-{on}", "tcp4", "cancel", options={"keepalives": on, **KEEPALIVES}, shows=DELIVERED)
              for on in ("0", "1")]


@pytest.mark.parametrize("scenario,host", cases(SCENARIOS))
def test_same_as_libpq18(old, tmp_path, scenario, host):
    compare(old, scenario, tmp_path / "home", host)


def in_tls(ending, answer=b""):
    return lambda c: scripts.after_tls_cancel_request("tls", tls_context(c, c.server), ending, answer)


# What becomes of the cancel of a TLS session (libpq sends it in the clear and can say nothing of the kind).
OVER_TLS = {
    "close": (in_tls(close), DELIVERED),
    "reset": (in_tls(reset), DELIVERED),
    "answer": (in_tls(close, FORGED_ERROR), r"PQcancel() -- unexpected response from server\n"),
    "refuses-tls": (lambda c: scripts.after_ssl_request(close, b"N"),
                    r"PQcancel() -- server does not support SSL, but SSL was required\n"),
    "answers-E": (lambda c: scripts.after_ssl_request(close, FORGED_ERROR),
                  r"PQcancel() -- server sent an error response during SSL exchange\n"),
    "closes": (lambda c: scripts.after_ssl_request(close), r"PQcancel() -- server closed the connection unexpectedly\n"),
    "wrong-CA": (scripts.with_certificate("other_server"), r"PQcancel() -- SSL error: certificate verify failed\n"),
}


@pytest.mark.parametrize("sslmode", ["verify-full", "prefer"])
@pytest.mark.parametrize("name", OVER_TLS)
def test_over_tls(old, tmp_path, name, sslmode):
    """Also with sslmode=prefer, where libpq's newer functions fall back to plaintext. run_ours sees that nothing is readable."""
    script, shows = OVER_TLS[name]
    scenario = Scenario("old-over-tls", "tls15", "cancel", options={"sslmode": sslmode},
                        script=lambda c: always_closed(script(c)), shows=shows)
    programs.run_ours(old, scenario, tmp_path / "home")


@pytest.mark.parametrize("script", [scripts.after_ssl_request(scripts.hold), scripts.at_once(scripts.hold)])
def test_no_answer_within_connect_timeout(old, tmp_path, script):
    scenario = Scenario("old-silent", "tls15", "cancel", options={"connect_timeout": "2"}, script=lambda c: script,
                        shows=r'PQcancel -> 0 errno kept, errbuf "PQcancel() -- timeout expired\n"')
    programs.run_ours(old, scenario, tmp_path / "home")


# The older ones and Debian's, over plaintext and TLS.
@pytest.mark.parametrize("transport", ["tcp4", "tls15"])
@pytest.mark.parametrize("major", [13, 14, 16, 17, 18, "system"])
def test_objects_cross_between_libpqs_functions_and_ours(old, tmp_path, monkeypatch, major, transport):
    """libpq's block gets what libpq would have done. Ours, in libpq's hands, sends nothing of a TLS session."""
    if major != "system":
        monkeypatch.setattr(old, "libraries",
                            lambda _: [old.build, old.library.parent, peers.postgres(major) / "lib"])
    encrypted = TRANSPORTS[transport][1] == "tls"
    scenario = Scenario("old", transport, "crossing", shows='ours, freed by libpq -> 1 ""')
    outcome = old.over_pqcancel(scenario, tmp_path / "home", "system")
    report = f"{outcome.report}\n{outcome.stderr}"
    assert "exit status 0" in outcome.transcript and scenario.shows in outcome.transcript, report
    assert "libpq's, cancelled and freed by ours -> 1 \"\"" in outcome.transcript, report
    last = "ours, cancelled by libpq -> 0 \"PQcancel() -- connect() failed" if encrypted else "ours, cancelled by libpq -> 1"
    assert last in outcome.transcript, report
    readable = [programs.wire.is_readable(connection) for connection in outcome.connections]
    assert readable == ([True, False] if encrypted else [True, True, True]), report


@pytest.mark.parametrize("transport", ["tcp4", "tls15"])
def test_programs_that_look_into_the_struct_find_what_they_look_for(old, tmp_path, transport):
    encrypted = TRANSPORTS[transport][1] == "tls"
    shows = f"be_pid: the backend's\nbe_key: libpq's\naddress: libpq's\nlength: {'none' if encrypted else 'libpqs'}"
    scenario = Scenario("old", transport, "struct", shows=shows.replace("libpqs", "libpq's"))
    programs.run_ours(old, scenario, tmp_path / "home")


@pytest.mark.parametrize("transport,threads", [("tcp4", 1), ("unix", 1), ("tls15", 2)])
def test_nothing_is_started_for_a_session_in_plaintext(old, tmp_path, transport, threads):
    programs.run_ours(old, Scenario("old", transport, "threads", shows=f"threads: {threads}\n"), tmp_path / "home")
