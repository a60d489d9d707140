"""Programs that read struct pg_cancel, and PGcancels that cross between libpq's own functions and ours, over every libpq in
use, linked and preloaded. Each cancels a real query."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import peers
import programs
from eavesdropper import Cancels, Eavesdropper
from matrix import MAJORS
from preloaded import WRAPPER
from programs import BUILD
from test_memory import LEAKS, VALGRIND
import wire

pytestmark = pytest.mark.matrix

WITH_PACKET = 18
KEYS_OF_PROTOCOL_3_2 = {"min_protocol_version": "3.2", "max_protocol_version": "3.2"}

each_way = pytest.mark.parametrize("way", ["linked", "preloaded"])
each_sslmode = pytest.mark.parametrize("sslmode", ["verify-full", "disable"], ids=["tls", "plaintext"])


@pytest.fixture(scope="module")
def commands():
    """What runs the program: linked with the library, and linked with libpq only."""
    sources = ("driver.c", "pg_cancel_struct.c", "query.c", "session.c", "transcript.c")
    made = programs.build(BUILD / "pg_cancel_struct", sources, oracle=False)
    return {"linked": [made / "driver-pqcancel"], "preloaded": [WRAPPER, programs.link_with_libpq_only(made, sources)]}


def run(command: list, libpq: Path | None, eavesdropper: Eavesdropper, scenario: str, **options: str) -> list[str]:
    """What the program told, on this libpq or on Debian's."""
    libraries = [programs.library_directory(), *([libpq] if libpq else [])]
    environment = {"HOME": os.devnull, "LC_ALL": "C", "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
                   "DRIVER_MONITOR": eavesdropper.server.conninfo(sslmode="disable")}
    result = subprocess.run([*command, eavesdropper.conninfo(**options), scenario], env=environment, text=True,
                            stdin=subprocess.DEVNULL, capture_output=True, timeout=630)
    assert (result.returncode, result.stderr) == (0, ""), result
    session, *lines = [line for line in result.stdout.splitlines() if line]
    assert session == f"session: ssl={int(options['sslmode'] != 'disable')}"
    return lines


def lib(major: int) -> Path:
    return peers.postgres(major) / "lib"


@each_sslmode
@each_way
@pytest.mark.parametrize("major", [major for major in MAJORS if major < WITH_PACKET])
def test_be_pid_and_be_key(commands, eavesdropper, major, way, sslmode):
    """As ruby-pg reads them, and with them cancels by itself: in plaintext, which is its own affair."""
    told = run(commands[way], lib(major), eavesdropper, "pid-and-key", sslmode=sslmode)
    assert told == ["be_pid: the backend's", "be_key: libpq's", "query: 57014"]
    assert eavesdropper.cancels == Cancels(readable=1, encrypted=0)


@each_sslmode
@each_way
@pytest.mark.parametrize("options,size", [({}, 16), (KEYS_OF_PROTOCOL_3_2, 44)], ids=["3.0", "3.2"])
def test_the_packet_of_libpq18(commands, certs, servers, way, sslmode, options, size):
    """It can be sent as it is, whatever the length of the key."""
    with Eavesdropper(servers["18"], certs) as eavesdropper:
        told = run(commands[way], lib(18), eavesdropper, "packet", sslmode=sslmode, **options)
        assert told == ["code: CancelRequest", "pid: the backend's", f"packet of {size} bytes: libpq's", "query: 57014"]
        _, cancel = eavesdropper.connections
    assert wire.summary(cancel) == f"CancelRequest of {size} bytes in the clear"


@each_sslmode
@each_way
@pytest.mark.parametrize("major", MAJORS)
def test_theirs_in_our_hands(commands, eavesdropper, major, way, sslmode):
    """Sent as that libpq would have sent it: nothing in it tells of TLS."""
    told = run(commands[way], lib(major), eavesdropper, "theirs-in-our-hands", sslmode=sslmode)
    assert told == ["first, our PQcancel -> 1 ", "query: 57014", "then, our PQcancel -> 1 ", "query: 57014"]
    assert eavesdropper.cancels == Cancels(readable=2, encrypted=0)


@each_sslmode
@each_way
@pytest.mark.parametrize("major", MAJORS)
def test_ours_in_their_hands(commands, eavesdropper, major, way, sslmode):
    """In plaintext it does what theirs does. Of a TLS session nothing is sent, the query goes on, and ours ends it."""
    first, *told = run(commands[way], lib(major), eavesdropper, "ours-in-their-hands", sslmode=sslmode)
    if sslmode == "disable":
        assert [first, *told] == ["libpq's PQcancel -> 1 ", "query: 57014"]
        assert eavesdropper.cancels == Cancels(readable=1, encrypted=0)
    else:
        assert first.startswith("libpq's PQcancel -> 0 PQcancel() -- connect() failed: ")
        assert told == ["our PQcancel -> 1 ", "query: 57014"]
        assert eavesdropper.cancels == Cancels(readable=0, encrypted=1)
        assert len(eavesdropper.connections) == 2


@each_sslmode
@pytest.mark.parametrize("scenario", ["theirs-in-our-hands", "ours-in-their-hands"])
def test_nothing_is_lost_or_misused(commands, eavesdropper, scenario, sslmode):
    valgrind = [*VALGRIND, f"--show-leak-kinds={LEAKS['old']}", f"--errors-for-leak-kinds={LEAKS['old']}"]
    told = run([*valgrind, *commands["linked"]], None, eavesdropper, scenario, sslmode=sslmode)
    assert told[-1] == "query: 57014"
