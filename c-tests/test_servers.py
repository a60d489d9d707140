"""Servers of every version from 12 on take the cancel over TLS, and none answers the ClientHello with HelloRetryRequest."""

from __future__ import annotations

import pytest

import comparison
import peers
from comparison import Laboratory, Scenario, compare
from server import Postgres

# Debian's (15) and 18 are in every other test.
MAJORS = [major for major in peers.EMBEDDED if major != 18]


@pytest.mark.parametrize("major", MAJORS)
def test_same_as_libpq18(laboratory, certs, tmp_path, monkeypatch, major):
    monkeypatch.setitem(comparison.TRANSPORTS, f"tls{major}", (str(major), "tls", "tcp4"))
    # Abstract Unix sockets came with 14.
    with Postgres(peers.postgres(major), certs, settings={"unix_socket_directories": ""}) as server:
        only = Laboratory(certs, {str(major): server}, laboratory.build, laboratory.oracle, laboratory.library)
        try:
            compare(only, Scenario("server", f"tls{major}", shows="PQcancelPoll -> OK"), tmp_path / "home", "system")
        finally:
            only.close()
