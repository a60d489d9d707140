"""pqcancel against libpq 18: cancels of sessions that are encrypted with GSSAPI, over a real server and with real tickets."""

from __future__ import annotations

import struct
import subprocess

import pytest

import gss_scripts
import programs
import wire
from comparison import Scenario, cases, compare
from test_oracle import LIFE

SESSION = "c-tests/test_gss.py"  # its application_name
# The last one to come: one that is over may not have gone yet.
IT = f"where application_name = '{SESSION}' order by backend_start desc limit 1"
HOW_PROTECTED = f"""
select gss_authenticated, gss.encrypted, ssl from pg_stat_activity
join pg_stat_gssapi gss using (pid) join pg_stat_ssl using (pid) {IT}
"""
CANCEL_REQUEST = struct.Struct("!IIII")
CANCEL_REQUEST_CODE = 80877102
# All that is on the wire of a cancel, from the client. The last is the request and what encryption adds to it.
SEALED = "wire 1: GSSENCRequest, token, packet of 76 bytes"
CANCELLED = "result: SQLSTATE 57014\nnext query: 42\n"
OK = "-> OK  status=OK"

# Over Debian's libpq and over the oracle's; and over that of psycopg2, whose GSSAPI library is as private as the oracle's.
SCENARIOS = [Scenario("gss-life", "gss", run, number, shows=shows) for run, number, shows in LIFE]
SCENARIOS += [Scenario("gss-life-on-17", "gss", run, number, shows=shows, only_host="17") for run, number, shows in LIFE
              if run in ("query", "cycles")]
SCENARIOS += [
    Scenario("gss-life", "gss", "reset-bad", shows="PQcancelReset -> void  status=ALLOCATED"),
    Scenario("gss-life", "gss", "bad-session", sessions=2, shows="session: bad options, status not OK"),
]
# Whatever else the session was ready for.
SCENARIOS += [Scenario(f"gss-prefer-{sslmode}", "gss", run, shows=SEALED,
                       options={"gssencmode": "prefer", "sslmode": sslmode, "sslrootcert": "{c.ca}"})
              for sslmode in ("disable", "prefer", "verify-full") for run in ("polled", "query")]


@pytest.mark.parametrize("scenario,host", cases(SCENARIOS))
def test_same_as_libpq18(gss, tmp_path, scenario, host):
    compare(gss, scenario, tmp_path / "home", host)


def ask(server, query: str) -> str:
    command = [server.prefix / "bin" / "psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--command", query,
               server.conninfo(host=server.socket_dir)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("host", ["system", "17", "18"])
@pytest.mark.parametrize("options,protected,sent", [
    ({"gssencmode": "require"}, "t|t|f", SEALED),
    ({"gssencmode": "disable", "sslmode": "verify-full", "sslrootcert": "{c.ca}"}, "t|f|t", "wire 1: SSLRequest, ClientHello("),
], ids=["gss", "tls"])
def test_the_query_ends_and_nothing_is_readable(gss, tmp_path, options, protected, sent, host):
    """What the server knows of the session, and what is on the wire; the other session of the same user is the control."""
    told: list[str] = []
    scenario = Scenario("gss-query", "gss", "query", options={"application_name": SESSION, **options},
                        at_session=lambda *_: told.append(ask(gss.servers["gss"], HOW_PROTECTED)))
    outcome = gss.over_pqcancel(scenario, tmp_path / "home", host)
    assert told == [protected]
    assert outcome.shows(CANCELLED) and outcome.stderr == "", outcome
    assert outcome.wire.startswith(sent) and len(outcome.connections) == 1, outcome.wire
    assert not any(wire.is_readable(connection) for connection in outcome.connections)


@pytest.mark.usefixtures("acceptor")
@pytest.mark.parametrize("host", ["system", "17", "18"])
@pytest.mark.parametrize("run", [0, 1], ids=["blocking", "polled"])
def test_the_request_is_what_is_encrypted(gss, tmp_path, run, host):
    """A server of ours, which has the key of the service, takes it out and hands it to the real one: the query ends."""
    requests: list[bytes] = []
    pid: list[str] = []
    scenario = Scenario("gss-inside", "gss", "query", run, options={"application_name": SESSION}, shows=CANCELLED,
                        script=lambda _: lambda connection: gss_scripts.pass_request_on(connection, requests),
                        at_session=lambda *_: pid.append(ask(gss.servers["gss"], f"select pid from pg_stat_activity {IT}")))
    compare(gss, scenario, tmp_path / "home", host)
    theirs, ours = map(CANCEL_REQUEST.unpack, requests)
    assert [request[:3] for request in (theirs, ours)] == [(16, CANCEL_REQUEST_CODE, int(of_session)) for of_session in pid]


@pytest.mark.usefixtures("acceptor")
def test_another_key_ends_nothing(gss, tmp_path):
    """Control experiment for the last: the same way, but for one bit of the key."""
    scenario = Scenario("gss-inside", "gss", "polled", options={"application_name": SESSION}, shows=OK,
                        script=lambda _: lambda connection: gss_scripts.pass_request_on(connection, change=1))
    outcome = programs.run_ours(gss, scenario, tmp_path / "home")
    assert "wrong key in cancel request" in gss.servers["gss"].log.read_text()
    assert outcome.wire == SEALED
