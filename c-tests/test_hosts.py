"""libpqs that pqcancel does not know: newer than 18, and older than 10. A newer one is used as long as its struct pg_cancel is
18's; else a TLS session is refused in so many words, and one in plaintext goes on as without us. (test_matrix.py has those
that it knows.)
"""

from __future__ import annotations

import os
import subprocess

import pytest

import peers
import programs
from eavesdropper import Cancels
from programs import SOURCES

NEW = ["PQcancelBlocking", "PQcancelPoll"]
OLD = ["PQcancel", "PQrequestCancel"]
OLDEST, NEWER = 90624, 190000

LAYOUT = (f"pqcancel could not read the cancel key from the libpq in use (version {NEWER}): "
          "its layout is not the expected one")
UNKNOWN = f"pqcancel does not know the libpq in use (version {OLDEST}); it knows those of PostgreSQL 10 and later"


@pytest.fixture(scope="module")
def program():
    return programs.build_functions() / "driver-pqcancel"


@pytest.fixture
def libpq(tmp_path):
    """Directory for a libpq.so.5 of the test's own, with what libpq 18 needs beside it."""
    made = tmp_path / "libpq"
    made.mkdir()
    for library in peers.libpq18().iterdir():
        if library.name != "libpq.so.5":
            (made / library.name).symlink_to(library)
    return made


def another_version(directory, version: int) -> None:
    """libpq 18, which calls itself another one."""
    real = (peers.libpq18() / "libpq.so.5").read_bytes()
    returns = [b"\xb8" + number.to_bytes(4, "little") + b"\xc3" for number in (180006, version)]  # mov, ret
    assert real.count(returns[0]) == 1
    (directory / "libpq.so.5").write_bytes(real.replace(*returns))


def another_layout(directory) -> None:
    """libpq 18, with some functions of newer_libpq.c in the place of its own."""
    lib = peers.postgres(18).absolute() / "lib"
    renamed = [f"--redefine-sym={name}=libpq18_{name}" for name in ("PQlibVersion", "PQgetCancel", "PQcancel", "PQfreeCancel")]
    subprocess.run(["objcopy", *renamed, lib / "libpq.a", directory / "libpq.a"], check=True)
    programs.cc(directory / "libpq.so.5", SOURCES / "newer_libpq.c", "-fPIC", *peers.whole_libpq(lib, directory / "libpq.a"))


def run(program, libpq, eavesdropper, home, sslmode: str, scenario: str) -> list[str]:
    """What the functions did."""
    environment = {"HOME": str(home), "LC_ALL": "C",
                   "LD_LIBRARY_PATH": os.pathsep.join([str(programs.library_directory()), str(libpq)]),
                   "DRIVER_MONITOR": eavesdropper.server.conninfo(sslmode="disable")}
    command = [program, eavesdropper.conninfo(sslmode=sslmode), scenario]
    result = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150)
    assert (result.returncode, result.stderr) == (0, ""), result
    first, *lines = [line for line in result.stdout.splitlines() if line]
    assert first == f"session: ssl={int(sslmode != 'disable')}"
    return lines


def cancelled(version: int, functions: list[str]) -> list[str]:
    return [f"libpq: {version}", *(f"{function} -> 1, query: 57014" for function in functions)]


@pytest.mark.parametrize("sslmode,cancels", [("verify-full", Cancels(0, 4)), ("disable", Cancels(4, 0))])
def test_a_newer_libpq_of_the_same_layout(program, libpq, eavesdropper, tmp_path, sslmode, cancels):
    another_version(libpq, NEWER)
    assert run(program, libpq, eavesdropper, tmp_path, sslmode, "cancelled") == cancelled(NEWER, NEW + OLD)
    assert eavesdropper.cancels == cancels


def refusals(message: str, functions: list[str]) -> list[str]:
    said = {"PQcancel": f"PQcancel() -- {message}", "PQrequestCancel": f"PQcancel() -- {message}"}
    return [line for name in functions for line in (f"{name}: {said.get(name, message)}", f"{name} -> 0")]


@pytest.mark.parametrize("message", [LAYOUT, UNKNOWN], ids=["newer", "too-old"])
def test_a_tls_session_is_refused(program, libpq, eavesdropper, tmp_path, message):
    another_layout(libpq) if message == LAYOUT else another_version(libpq, OLDEST)
    assert run(program, libpq, eavesdropper, tmp_path, "verify-full", "idle") == refusals(message, NEW + OLD)
    assert len(eavesdropper.connections) == 1, "more than the session was connected"


@pytest.mark.parametrize("message", [LAYOUT, UNKNOWN], ids=["newer", "too-old"])
def test_a_session_in_plaintext_goes_on(program, libpq, eavesdropper, tmp_path, message):
    """By the old functions, which are then libpq's own."""
    another_layout(libpq) if message == LAYOUT else another_version(libpq, OLDEST)
    lines = run(program, libpq, eavesdropper, tmp_path, "disable", "old")
    assert lines == cancelled(NEWER if message == LAYOUT else OLDEST, OLD)
    assert eavesdropper.cancels == Cancels(readable=2, encrypted=0)
