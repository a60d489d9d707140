"""The point of it all: a running query is cancelled through pqcancel, straight to a real server, and the session works on."""

from __future__ import annotations

import subprocess

import pytest

TRANSPORTS = ["tcp4", "tcp6", "unix", "abstract", "prefer", "verify-full", "direct"]


def conninfo(server, certs, transport):
    tls = {"host": "localhost", "hostaddr": server.host, "sslmode": "verify-full", "sslrootcert": certs.ca}
    options = {
        "tcp4": {"sslmode": "disable"},
        "tcp6": {"host": "::1", "sslmode": "disable"},
        "unix": {"host": server.socket_dir},
        "abstract": {"host": server.abstract_dir},
        "prefer": {"sslmode": "prefer"},
        "verify-full": tls,
        "direct": {**tls, "sslnegotiation": "direct"},
    }
    return server.conninfo(**options[transport])


def run_driver(laboratory, server, libraries, home, transport, scenario, number):
    """driver-pqcancel over these libraries, straight to the server."""
    environment = {
        "HOME": str(home),
        "LC_ALL": "C",
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "DRIVER_MONITOR": server.conninfo(sslmode="disable"),
    }
    command = [laboratory.build / "driver-pqcancel", conninfo(server, laboratory.certs, transport), scenario, str(number)]
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150)


@pytest.mark.parametrize("polled", [0, 1], ids=["blocking", "polled"])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("version", ["15", "18"])
@pytest.mark.parametrize("host", ["system", "18"])
def test_query_is_cancelled(laboratory, tmp_path, host, version, transport, polled):
    if transport == "direct" and (host, version) != ("18", "18"):
        pytest.skip("direct TLS came with PostgreSQL 17, in libpq and in the server")
    server = laboratory.servers[version]
    result = run_driver(laboratory, server, laboratory.libraries(host), tmp_path, transport, "query", polled)
    assert result.returncode == 0, result
    encrypted = transport in ("prefer", "verify-full", "direct")
    assert f"session: ssl={int(encrypted)}\n" in result.stdout
    assert "result: SQLSTATE 57014\nnext query: 42\n" in result.stdout, result
