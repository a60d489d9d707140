"""Cancel keys of protocol 3.2, which may have any length from 4 to 256 bytes, and keys as only strange servers send them."""

from __future__ import annotations

import os
import re
import subprocess
from typing import NamedTuple

import pytest

import peers
import programs
import scripts
import wire
from eavesdropper import FRAME, Eavesdropper
from key_server import KeyServer, Request
from server import conninfo
from wire import TLS13_OVERHEAD

PROTOCOL_3_2 = {"min_protocol_version": "3.2", "max_protocol_version": "3.2"}
KEY_OF_18 = 32  # bytes that server 18 sends
REQUEST_HEAD = 12
LENGTHS = range(4, 257)  # that libpq 18 takes
FUNCTIONS = ["PQcancelBlocking", "PQcancelPoll", "PQcancel", "PQrequestCancel"]

each_sslmode = pytest.mark.parametrize("sslmode", ["verify-full", "disable"], ids=["tls", "plaintext"])


@pytest.fixture(scope="module")
def functions():
    return programs.build_functions() / "driver-pqcancel"


@pytest.fixture(scope="module")
def keys():
    """Directory with keys.c over pqcancel and over libpq 18."""
    return programs.build(programs.BUILD / "keys", ("driver.c", "keys.c", "session.c", "transcript.c"))


def run(*command, libraries, **environment: str) -> str:
    """What a program prints, over these libraries, or over pqcancel and Debian's libpq."""
    environment.update(HOME=os.devnull, LC_ALL="C", LD_LIBRARY_PATH=os.pathsep.join(map(str, libraries)))
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=630)
    assert (result.returncode, result.stderr) == (0, ""), result
    return result.stdout


@each_sslmode
def test_a_key_of_server_18(certs, servers, functions, sslmode):
    """Of 32 bytes: a real query is cancelled, and the request has the size that it must have."""
    with Eavesdropper(servers["18"], certs) as eavesdropper:
        told = run(functions, eavesdropper.conninfo(sslmode=sslmode, **PROTOCOL_3_2), "cancelled",
                   libraries=[programs.library_directory(), peers.libpq18()],
                   DRIVER_MONITOR=servers["18"].conninfo(sslmode="disable"))
        _, *cancels = eavesdropper.connections
    assert told.splitlines()[2:] == [f"{function} -> 1, query: 57014" for function in FUNCTIONS]
    size = REQUEST_HEAD + KEY_OF_18
    if sslmode == "disable":
        assert [len(cancel.sent_by_client) for cancel in cancels] == [size] * 4
        assert all(map(wire.is_readable, cancels))
    else:
        for cancel in cancels:
            clear, sealed = wire.read(cancel)
            assert clear == wire.SSL_REQUEST
            assert [length for length in sealed if length not in FRAME] == [size + TLS13_OVERHEAD]


class Outcome(NamedTuple):
    """Of one run of keys.c."""

    told: str
    handed_out: list[bytes]  # the CancelRequest for each key
    requests: list[Request]

    @property
    def packets(self) -> list[bytes]:
        return [request.packet for request in self.requests]


def over_one(driver, libraries, certs, sslmode: str, scenario: list[str], options: dict[str, str]) -> Outcome:
    with KeyServer(scripts.tls_context(certs, certs.server)) as server:
        place = conninfo(host="localhost", hostaddr=server.host, port=server.port, user="postgres", dbname="4",
                         sslmode=sslmode, sslrootcert=certs.ca, **options)
        told = run(driver, place, *scenario, libraries=libraries)
    return Outcome(told.replace(f"port {server.port}", "port"), server.handed_out, server.requests)


def over_pqcancel(keys, certs, sslmode: str, *scenario: str, host: str = "18", **options: str) -> Outcome:
    """The same as over libpq 18 is shown and sent, and protected as the session is."""
    oracle = peers.libpq18()
    theirs = over_one(keys / "driver-libpq18", [oracle], certs, sslmode, scenario, options)
    ours = over_one(keys / "driver-pqcancel", [programs.library_directory(), *([oracle] if host == "18" else [])], certs,
                    sslmode, scenario, options)
    assert ours.told == theirs.told
    assert ours.handed_out == theirs.handed_out
    assert ours.packets == theirs.packets
    encrypted = sslmode != "disable"
    assert all(request.encrypted == encrypted for request in ours.requests)
    # The control: PQcancel of libpq 18 is what is not encrypted.
    assert any(not request.encrypted for request in theirs.requests) or not theirs.requests
    return ours


@each_sslmode
def test_every_length(keys, certs, sslmode):
    """What is too short or too long, libpq 18 refuses, and the session with it."""
    outcome = over_pqcancel(keys, certs, sslmode, "every-length", **PROTOCOL_3_2)
    _, *handed_out = outcome.handed_out
    assert [len(packet) - REQUEST_HEAD for packet in handed_out] == [*range(258)]
    good = [packet for packet in handed_out if len(packet) - REQUEST_HEAD in LENGTHS]
    assert outcome.packets == [packet for packet in good for _ in FUNCTIONS]
    assert outcome.told.count("PQrequestCancel -> 1") == len(LENGTHS)
    for length, problem in ((3, "too short"), (257, "too long")):
        assert re.search(rf"key: {length}, session: BAD .* {problem}", outcome.told)


@each_sslmode
@pytest.mark.parametrize("length", [4, 5, 32, 256])
def test_another_key_in_the_middle_of_a_session(keys, certs, sslmode, length):
    """Twice. A PGcancel and a PGcancelConn keep the key of their time, the first one."""
    outcome = over_pqcancel(keys, certs, sslmode, "another-key", str(length), **PROTOCOL_3_2)
    first, second, third = outcome.handed_out
    assert outcome.packets == [packet for packet in (second, third) for _ in FUNCTIONS] + [first, first]


each_host = pytest.mark.parametrize("host", ["18", "system"])


@each_sslmode
@each_host
def test_another_key_in_protocol_3_0(keys, certs, sslmode, host):
    outcome = over_pqcancel(keys, certs, sslmode, "another-key", "4", host=host)
    first, second, third = outcome.handed_out
    assert outcome.packets == [packet for packet in (second, third) for _ in FUNCTIONS] + [first, first]


@each_sslmode
@each_host
def test_no_key(keys, certs, sslmode, host):
    """The session is as good as any, but nothing can cancel it."""
    outcome = over_pqcancel(keys, certs, sslmode, "no-key", host=host)
    assert outcome.requests == []
    assert "key: none, session: OK" in outcome.told
    assert 'PQcancelCreate -> object  status=BAD socket=-1 error="no cancellation key received' in outcome.told
    assert 'PQgetCancel -> a PGcancel\nPQcancel -> 0 "PQcancel() -- no cancellation key received"' in outcome.told


@each_sslmode
@each_host
def test_pid_zero(keys, certs, sslmode, host):
    outcome = over_pqcancel(keys, certs, sslmode, "pid-zero", host=host)
    assert outcome.packets == [outcome.handed_out[1]] * 4
