"""Every libpq in use, linked and preloaded, against every server in use, over TLS and in plaintext, by every function that
cancels: the query ends, and nobody on the wire could read the cancel of a TLS session.

Takes minutes and fetches what it needs, so it is not part of `make test` but of `make test-matrix`.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack

import pytest

import matrix
import peers
import programs
from eavesdropper import Cancels, Eavesdropper
from matrix import MAJORS
from preloaded import WRAPPER
from server import Postgres

pytestmark = pytest.mark.matrix

FUNCTIONS = ["PQcancelBlocking", "PQcancelPoll", "PQcancel", "PQrequestCancel"]
# How often a query is cancelled in a field of the table.
FULL = len(FUNCTIONS) * 4


@pytest.fixture(scope="module")
def program():
    """Directory with a program linked with the library, and one that knows of libpq only."""
    made = programs.build_functions()
    programs.link_with_libpq_only(made, programs.FUNCTIONS)
    return made


@pytest.fixture(scope="module")
def server(certs):
    """By major version, started when it is asked for."""
    running: dict[int, Postgres] = {}
    with ExitStack() as stack:
        def start(major: int) -> Postgres:
            if major not in running:
                running[major] = stack.enter_context(Postgres(peers.postgres(major), certs))
            return running[major]
        yield start


def command(program, way: str) -> tuple[list, list]:
    """What to run, and where the loader looks for the library."""
    if way == "linked":
        return [program / "driver-pqcancel"], [programs.library_directory()]
    return [WRAPPER, program / "driver-libpq"], []


@pytest.mark.parametrize("sslmode", ["verify-full", "disable"], ids=["tls", "plaintext"])
@pytest.mark.parametrize("way", ["linked", "preloaded"])
@pytest.mark.parametrize("version", MAJORS)
@pytest.mark.parametrize("libpq", MAJORS)
def test_cancelled(certs, server, program, tmp_path, libpq, version, way, sslmode):
    words, libraries = command(program, way)
    with Eavesdropper(server(version), certs) as eavesdropper:
        environment = {"HOME": str(tmp_path), "LC_ALL": "C",
                       "LD_LIBRARY_PATH": os.pathsep.join(map(str, [*libraries, peers.postgres(libpq) / "lib"])),
                       "DRIVER_MONITOR": server(version).conninfo(sslmode="disable")}
        result = subprocess.run([*words, eavesdropper.conninfo(sslmode=sslmode), "cancelled"], env=environment,
                                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=630)
    encrypted = sslmode == "verify-full"
    lines = result.stdout.splitlines()
    assert (result.returncode, result.stderr) == (0, ""), result
    assert lines[0] == f"session: ssl={int(encrypted)}"
    assert lines[1].startswith(f"libpq: {libpq}0"), "another libpq was found"
    assert lines[2:] == [f"{function} -> 1, query: 57014" for function in FUNCTIONS]
    count = len(FUNCTIONS)
    assert eavesdropper.cancels == (Cancels(0, count) if encrypted else Cancels(count, 0))
    matrix.cancelled[libpq, version] += count


def test_the_readme_carries_the_table():
    """The last test of this file: all fields are counted."""
    assert set(matrix.cancelled.values()) == {FULL} and len(matrix.cancelled) == len(MAJORS) ** 2
    assert matrix.table() in (peers.ROOT / "README.md").read_text(), matrix.table()
