"""The libpq below pqcancel may be any from 13 to 18; an older one is refused in so many words."""

from __future__ import annotations

import pytest

import peers
from test_real import run_driver

KNOWN = [13, 14, 16, 17, 18]  # Debian's, and the oracle's 18, are in every other test


def run(laboratory, tmp_path, major, transport, scenario):
    """driver-pqcancel with the libpq of this version, against Debian's server."""
    server = laboratory.servers["15"]
    libraries = [laboratory.build, laboratory.library.parent, peers.postgres(major) / "lib"]
    return run_driver(laboratory, server, libraries, tmp_path, transport, scenario, 1)


@pytest.mark.parametrize("transport", ["tcp4", "unix", "verify-full"])
@pytest.mark.parametrize("major", KNOWN)
def test_query_is_cancelled_over(laboratory, tmp_path, major, transport):
    result = run(laboratory, tmp_path, major, transport, "query")
    assert result.returncode == 0, result
    assert f"session: ssl={int(transport == 'verify-full')}\n" in result.stdout
    assert "result: SQLSTATE 57014\nnext query: 42\n" in result.stdout, result


@pytest.mark.parametrize("transport", ["tcp4", "verify-full"])
def test_an_unknown_libpq_is_refused(laboratory, tmp_path, transport):
    result = run(laboratory, tmp_path, 12, transport, "blocking")
    assert "status=BAD" in result.stdout, result
    assert "pqcancel does not know the libpq in use (version 120022)" in result.stdout, result
