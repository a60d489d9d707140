"""psql in a terminal, and Ctrl-C: the cancel of a session over TLS goes over TLS, and everything else is as without us."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import scripts
from eavesdropper import Eavesdropper
from hostile import SSL_REQUEST
from monitor import SLEEPING, wait_until
from preloaded import BIN, TLS, WITHOUT, WRAPPER, Way, each_way
from programs import always_closed
from terminal import CTRL_C, Terminal

PROMPT = "postgres=# "
SENT = "Cancel request sent\n"
CANCELLED = "ERROR:  57014: canceling statement due to user request\n"
BY_WRAPPER = Way("verify-full", preloaded=False, readable=False)  # which does it in our place


@dataclass(frozen=True)
class Work:
    """Something that psql is in the middle of once the server and the wire show it."""

    lines: list[str]
    condition: str = SLEEPING
    bytes: int = 0  # that must have come from the server
    shows: str = CANCELLED


WORK = {
    "pg_sleep": Work(["select pg_sleep(600);"]),
    "long-result": Work([r"\pset pager off", "select generate_series(1, 1000000000);"], "state = 'active'", 1 << 20),
    "result-in-portions": Work([r"\pset pager off", r"\set FETCH_COUNT 10",
                                "select i, case when i > 10 then pg_sleep(600) end from generate_series(1, 20) i;"]),
    "copy-to-file": Work([r"\copy (select generate_series(1, 1000000000)) to 'copied'"], "state = 'active'", 1 << 20),
    # psql 15 does not always show the error that ends a watch, with pqcancel or without.
    "watch": Work([r"select pg_sleep(600) \watch 1"], shows=""),
}


@contextmanager
def psql(eavesdropper, home, way=TLS, command=(BIN / "psql",), **environment):
    """At its first prompt."""
    words = [*command, "--no-psqlrc", "--set=VERBOSITY=verbose", eavesdropper.conninfo(sslmode=way.sslmode)]
    with Terminal(words, way.environment(home, **environment), directory=home) as terminal:
        terminal.expect(PROMPT)
        yield terminal


def begin(terminal, monitor, eavesdropper, work) -> None:
    for line in work.lines:
        terminal.type(line)
    monitor.wait_for(1, eavesdropper.name, work.condition)
    wait_until(lambda: eavesdropper.received >= work.bytes)


def assert_cancelled(terminal, shows=CANCELLED) -> None:
    """The query has ended with the server's error, and the session works on."""
    terminal.expect(shows)
    terminal.expect(PROMPT)
    assert_works_on(terminal)


def assert_works_on(terminal) -> None:
    terminal.type("select 6 * 7;")
    terminal.expect(" 42\n")
    terminal.expect(PROMPT)


def come_to_rest(terminal) -> None:
    """Once psql reads a key, every Ctrl-C before that key is a signal: the last one may take this one key with it."""
    terminal.type("")
    terminal.type(r"\echo at rest")
    terminal.expect(r"[\r\n]at rest\n")
    terminal.expect(PROMPT)


def leave(terminal) -> None:
    """psql ends well, and the terminal is as it was before."""
    terminal.type(r"\q")
    assert terminal.wait() == 0
    assert terminal.settings() == terminal.settings_at_start


@each_way
@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_ctrl_c_ends_the_query_and_nothing_else(monitor, eavesdropper, tmp_path, work, way):
    with psql(eavesdropper, tmp_path, way) as terminal:
        settings_at_prompt = terminal.settings()
        begin(terminal, monitor, eavesdropper, work)
        terminal.press(CTRL_C)
        terminal.expect(SENT)
        assert_cancelled(terminal, work.shows)
        assert terminal.settings() == settings_at_prompt
        leave(terminal)
    assert "Could not send" not in terminal.output
    assert eavesdropper.cancels == way.shows(1)


@pytest.mark.parametrize("command,way", [(["/usr/bin/psql"], TLS), ([WRAPPER, "psql"], BY_WRAPPER)],
                         ids=["Debian's", "pqcancel psql"])
def test_as_users_start_it(monitor, eavesdropper, tmp_path, command, way):
    """Debian's psql is a Perl script, which starts the one of the right version."""
    with psql(eavesdropper, tmp_path, way, command) as terminal:
        begin(terminal, monitor, eavesdropper, WORK["pg_sleep"])
        terminal.press(CTRL_C)
        terminal.expect(SENT)
        assert_cancelled(terminal)
        leave(terminal)
    assert eavesdropper.cancels == way.shows(1)


def test_ctrl_c_while_idle_does_nothing(eavesdropper, tmp_path):
    with psql(eavesdropper, tmp_path) as terminal:
        settings_at_prompt = terminal.settings()
        for _ in range(3):
            terminal.press(CTRL_C)
            terminal.expect(PROMPT)
        assert terminal.settings() == settings_at_prompt
        assert_works_on(terminal)
        leave(terminal)
    assert len(eavesdropper.connections) == 1


def waits_for_signals(terminal) -> bool:
    """Between two watched queries psql is in sigwait(); before that, it may still be about the last one."""
    pid, = terminal.processes()
    return "sigtimedwait" in Path(f"/proc/{pid}/wchan").read_text()


def test_ctrl_c_between_two_watched_queries_ends_the_watch(eavesdropper, tmp_path):
    with psql(eavesdropper, tmp_path) as terminal:
        terminal.type(r"select 'seen' \watch 600")
        terminal.expect(r"\(1 row\)\n\n")
        wait_until(lambda: waits_for_signals(terminal))
        terminal.press(CTRL_C)
        terminal.expect(PROMPT)
        assert_works_on(terminal)
        leave(terminal)
    assert len(eavesdropper.connections) == 1


def test_ten_ctrl_c_one_after_the_other(monitor, eavesdropper, tmp_path):
    with psql(eavesdropper, tmp_path) as terminal:
        for _ in range(10):
            begin(terminal, monitor, eavesdropper, WORK["pg_sleep"])
            terminal.press(CTRL_C)
            terminal.expect(SENT)
            terminal.expect(CANCELLED)
            terminal.expect(PROMPT)
        assert_works_on(terminal)
        leave(terminal)
    assert eavesdropper.cancels == TLS.shows(10)


def test_ten_ctrl_c_at_once(monitor, eavesdropper, tmp_path):
    """The kernel makes one signal of those that come while the handler runs."""
    with psql(eavesdropper, tmp_path) as terminal:
        begin(terminal, monitor, eavesdropper, WORK["pg_sleep"])
        terminal.press(10 * CTRL_C)
        terminal.expect(SENT)
        terminal.expect(CANCELLED)
        terminal.expect(PROMPT)
        come_to_rest(terminal)
        assert_works_on(terminal)
        leave(terminal)
    sent = terminal.output.count(SENT)
    assert 1 <= sent <= 10
    assert eavesdropper.cancels == TLS.shows(sent)


HOSTILE = {
    "answers-N": (lambda c: scripts.refuse_tls_but_listen, "server does not support SSL, but SSL was required", "60"),
    "never-answers": (lambda c: scripts.after_ssl_request(scripts.hold), "timeout expired", "5"),
    "is-another": (scripts.with_certificate("other_server"), "SSL error: certificate verify failed", "60"),
}


def try_in_vain(terminal, monitor, eavesdropper, message: str) -> None:
    """Ctrl-C fails with this message, and the query goes on until somebody else cancels it."""
    begin(terminal, monitor, eavesdropper, WORK["pg_sleep"])
    terminal.press(CTRL_C)
    terminal.expect(f"Could not send cancel request: PQcancel\\(\\) -- {message}\n")
    monitor.wait_for(1, eavesdropper.name, SLEEPING)
    monitor.cancel(eavesdropper.name)
    assert_cancelled(terminal)
    leave(terminal)


@pytest.mark.parametrize("script,message,seconds", HOSTILE.values(), ids=HOSTILE)
def test_a_server_that_takes_no_tls_cancel_gets_none(servers, certs, monitor, tmp_path, script, message, seconds):
    with Eavesdropper(servers["15"], certs, always_closed(script(certs))) as eavesdropper:
        with psql(eavesdropper, tmp_path, PQCANCEL_TIMEOUT=seconds) as terminal:
            try_in_vain(terminal, monitor, eavesdropper, message)
    assert [connection.sent_by_client[:8] for connection in eavesdropper.connections] == [SSL_REQUEST]
    assert eavesdropper.cancels == TLS.shows(0)


def test_without_pqcancel_the_key_is_there_for_whoever_listens(servers, monitor, eavesdropper, tmp_path):
    """Why all this: the packet that was overheard once cancels that session's queries for as long as it lives."""
    with psql(eavesdropper, tmp_path, WITHOUT) as terminal:
        begin(terminal, monitor, eavesdropper, WORK["pg_sleep"])
        terminal.press(CTRL_C)
        assert_cancelled(terminal)
        begin(terminal, monitor, eavesdropper, WORK["pg_sleep"])
        overheard, = eavesdropper.readable
        with socket.create_connection((servers["15"].host, servers["15"].port)) as attacker:
            attacker.sendall(overheard.sent_by_client)
        assert_cancelled(terminal)
        leave(terminal)
    assert terminal.output.count(SENT) == 1
