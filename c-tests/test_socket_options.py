"""pqcancel against libpq 18: options that say where a cancel connection goes and how its socket is set up."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

import scripts
from comparison import Scenario, cases, compare

OK = "-> OK  status=OK"
# Where an option does not say otherwise: the machine's keepalive time, interval and number of probes, as a rule 7200, 75 and 9.
IDLE, INTERVAL, COUNT = (Path(f"/proc/sys/net/ipv4/tcp_keepalive_{name}").read_text().strip()
                         for name in ("time", "intvl", "probes"))
OURSELVES = pwd.getpwuid(os.geteuid()).pw_name


def socket_options(name, shows, transport="tcp4", **options):
    return Scenario(f"socket-{name}", transport, options=options, shows=shows)


SOCKETS = [
    socket_options("keepalives-off", f"keepalive=0 idle={IDLE}", keepalives="0"),
    socket_options("keepalives-off-but-set", f"keepalive=0 idle={IDLE}", keepalives="0", keepalives_idle="11"),
    socket_options("keepalives-on", "keepalive=1", keepalives="1"),
    socket_options("keepalives-two", "keepalive=1", keepalives="2"),
    socket_options("keepalives-empty", "keepalive=1", keepalives="1", keepalives_idle=" 12 "),
    socket_options("idle", f"keepalive=1 idle=11 interval={INTERVAL} count={COUNT}", keepalives_idle="11"),
    socket_options("interval", f"keepalive=1 idle={IDLE} interval=5 count={COUNT}", keepalives_interval="5"),
    socket_options("count", f"keepalive=1 idle={IDLE} interval={INTERVAL} count=3", keepalives_count="3"),
    socket_options("all", "idle=11 interval=5 count=3 user_timeout=7000", "tls15", keepalives_idle="11",
                   keepalives_interval="5", keepalives_count="3", tcp_user_timeout="7000"),
    socket_options("tcp6", "idle=11 interval=5 count=3 user_timeout=7000", "tcp6", keepalives_idle="11",
                   keepalives_interval="5", keepalives_count="3", tcp_user_timeout="7000"),
    socket_options("no-user-timeout", "user_timeout=0", tcp_user_timeout="0"),
    socket_options("negative-user-timeout", "user_timeout=0", tcp_user_timeout="-1"),
    socket_options("unix", "keepalive=0 idle=-1", "unix", keepalives_idle="11", tcp_user_timeout="7000"),
]

# The peer of a Unix socket: ours in the session, and in the cancel connection ours or another.
PEERS = [
    Scenario("requirepeer-right", transport, run, options={"requirepeer": OURSELVES}, shows="-> 1  status=")
    for transport in ("unix", "abstract") for run in ("polled", "blocking")
]
PEERS += [
    Scenario("requirepeer-wrong", transport, run, options={"requirepeer": OURSELVES}, between=scripts.another_user_listens,
             shows=f'requirepeer specifies "{OURSELVES}", but actual peer user name is "nobody"')
    for transport in ("unix", "abstract") for run in ("polled", "blocking")
]
PEERS += [
    Scenario("requirepeer-unset", "unix", between=scripts.another_user_listens, shows=OK),
    Scenario("requirepeer-tcp", "tcp4", options={"requirepeer": "nobody"}, shows=OK),
]


def service_file(directory, _certs):
    (directory / "services").write_text("[here]\nsslmode=verify-full\nkeepalives_idle=13\n")


# Port 1 (tcpmux) is closed: the session comes to be with the second host, and so must the cancel.
PLACES = [
    Scenario("two-hosts", "tls15", run, 3, shows="sni=localhost", options={
        "host": "a.pqcancel.test,localhost", "hostaddr": "127.0.0.1,127.0.0.1", "port": "1,PORT"})
    for run in ("polled", "blocking", "cycles")
]
PLACES += [
    Scenario("two-hosts-refused", "tls15", options={
        "host": "a.pqcancel.test,localhost", "hostaddr": "127.0.0.1,127.0.0.1", "port": "1,PORT"},
        between=scripts.nobody_listens, shows='connection to server at "127.0.0.1", port'),
    Scenario("first-of-two-refused", "tls15", options={
        "host": "localhost,a.pqcancel.test", "hostaddr": "127.0.0.1,127.0.0.1", "port": "PORT,1"},
        between=scripts.nobody_listens, shows='connection to server at "127.0.0.1", port'),
    Scenario("balanced-hosts", "tls18", options={
        "host": "a.pqcancel.test,localhost", "hostaddr": "127.0.0.1,127.0.0.1", "port": "1,PORT",
        "load_balance_hosts": "random"}, shows="sni=localhost"),
    Scenario("name-and-address-refused", "tcp4", options={"host": "some.name", "hostaddr": "127.0.0.1"},
             between=scripts.nobody_listens, shows='connection to server at "127.0.0.1", port'),
    Scenario("address-only-refused", "tcp4", options={"host": None, "hostaddr": "127.0.0.1"},
             between=scripts.nobody_listens, shows='connection to server at "127.0.0.1", port'),
    Scenario("resolved-name", "tcp4", options={"host": "localhost"}, shows='"localhost" (127.0.0.1)'),
    Scenario("service", "tls15", options={"service": "here", "sslmode": None}, prepare=service_file, shows="idle=13",
             environment={"PGSERVICEFILE": "{dir}/services"}),
    Scenario("gssencmode-disable", "tls15", options={"gssencmode": "disable"}, shows=OK),
    Scenario("gssencmode-prefer", "tcp4", options={"gssencmode": "prefer"}, shows=OK),
    Scenario("read-write", "tcp4", options={"target_session_attrs": "read-write"}, shows=OK),
    Scenario("application", "tcp4", options={"application_name": "x", "options": "-c geqo=off"}, shows=OK),
]

SCENARIOS = [*SOCKETS, *PEERS, *PLACES]


@pytest.mark.parametrize("scenario,host", cases(SCENARIOS))
def test_same_as_libpq18(laboratory, tmp_path, scenario, host):
    if scenario.between is scripts.another_user_listens and os.geteuid() != 0:
        pytest.skip("only root can listen as another user")
    compare(laboratory, scenario, tmp_path / "home", host)
