"""Python's drivers, whose libpqs are private: psycopg2 (libpq 17) and psycopg's C implementation (libpq 18)."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import pytest

import drivers
import peers
import scripts
import wire
from eavesdropper import Cancels, Eavesdropper
from hostile import SSL_REQUEST
from monitor import SLEEPING
from preloaded import TLS, WITHOUT, each_way
from programs import always_closed
from terminal import Terminal

CANCELLED = "query raised QueryCanceled canceling statement due to user request\n"
OLD = ["psycopg2_cancel", "psycopg_cancel", "psycopg_async_cancel"]  # by PQcancel
NEW = ["psycopg_cancel_safe", "psycopg_async_cancel_safe"]  # by PQcancelStart and PQcancelPoll


@contextmanager
def python(eavesdropper, driver, way, home, queries=1, **environment):
    """The program drivers.py, connected."""
    words = [sys.executable, "-B", drivers.__file__, driver, eavesdropper.conninfo(sslmode=way.sslmode), str(queries)]
    environment = way.environment(home, PYTHONPATH=str(peers.drivers()), PYTHONUNBUFFERED="1", **environment)
    with Terminal(words, environment, directory=home) as terminal:
        terminal.expect(r"psycopg2 2\.9\.13 on libpq 17\d{4}\n" if driver.startswith("psycopg2") else
                        r"psycopg 3\.3\.9 binary on libpq 18\d{4}\n")
        yield terminal


def cancel_twice(monitor, eavesdropper, driver, way, home) -> None:
    with python(eavesdropper, driver, way, home, queries=2) as terminal:
        for _ in range(2):
            monitor.wait_for(1, eavesdropper.name, SLEEPING)
            terminal.type("now")
            terminal.expect("cancel returned\n")
            terminal.expect(CANCELLED)
        terminal.expect("answer 42\n")
        assert terminal.wait() == 0


@each_way
@pytest.mark.parametrize("driver", OLD)
def test_cancel(monitor, eavesdropper, tmp_path, driver, way):
    cancel_twice(monitor, eavesdropper, driver, way, tmp_path)
    assert eavesdropper.cancels == way.shows(2)


@pytest.mark.parametrize("way", [TLS, WITHOUT], ids=["tls", "tls-without-pqcancel"])
@pytest.mark.parametrize("driver", NEW)
def test_cancel_safe(monitor, eavesdropper, tmp_path, driver, way):
    """libpq 18 does this by itself; but a server asks it for another key share each time, and never asks us."""
    cancel_twice(monitor, eavesdropper, driver, way, tmp_path)
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=2)
    assert [wire.is_retried(connection) for connection in eavesdropper.connections[1:]] == 2 * [not way.preloaded]


@pytest.mark.parametrize("driver,message", [
    *[(driver, "OperationalError .*PQcancel\\(\\) -- timeout expired") for driver in OLD],
    *[(driver, "CancellationTimeout cancellation timeout expired") for driver in NEW],
], ids=OLD + NEW)
def test_a_server_that_does_not_answer(servers, certs, monitor, tmp_path, driver, message):
    silent = always_closed(scripts.after_ssl_request(scripts.hold))
    with Eavesdropper(servers["15"], certs, silent) as eavesdropper:
        with python(eavesdropper, driver, TLS, tmp_path, PQCANCEL_TIMEOUT="3") as terminal:
            monitor.wait_for(1, eavesdropper.name, SLEEPING)
            terminal.type("now")
            terminal.expect(f"cancel raised {message}\n")
            monitor.cancel(eavesdropper.name)
            terminal.expect(CANCELLED)
            terminal.expect("answer 42\n")
            assert terminal.wait() == 0
    assert [connection.sent_by_client for connection in eavesdropper.connections] == [SSL_REQUEST]
