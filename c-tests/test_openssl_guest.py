"""Beside the host's own OpenSSL: its error queue, the passphrase hook that libpq lends to programs, the terminal."""

from __future__ import annotations

import os
import re
import shutil
import termios

import pytest

import programs
import scripts
from certs import PASSPHRASE
from comparison import HOSTS, Scenario, compare
from library import has_private_openssl
from programs import BUILD
from programs import always_closed
from scripts import close, tls_context

PROMPT = b"Enter PEM pass phrase:"
END = b"\f"


@pytest.fixture(scope="module")
def openssl_guest(certs, servers):
    directory = programs.build(BUILD / "openssl-guest", ("openssl_guest.c", "transcript.c"), "-Wno-deprecated-declarations",
                               "-lssl", "-lcrypto", oracle=False)
    yield from programs.open_laboratory(directory, certs, servers)


@pytest.fixture(scope="module")
def guest(certs, servers):
    yield from programs.open_laboratory(programs.build_guest(), certs, servers)


def serve(pair: str):
    """A server whose certificate is one of Certs. It also records the client's."""
    return lambda c: always_closed(scripts.after_tls_cancel_request(
        "tls", tls_context(c, getattr(c, pair)), close, close_notify=True))


def queues_of(transcript: str) -> set[str]:
    """What the program found in its error queue after each call. A library that shares its OpenSSL empties the queue before it
    asks OpenSSL for anything, as libpq does; of its own it never leaves anything behind."""
    found = re.findall(r"^after \w+: (.*)$", transcript, re.MULTILINE)
    assert len(found) == 8, transcript
    return set(found)


UNTOUCHED = {"exactly the host's entry"}
EXPECTED = [UNTOUCHED] if has_private_openssl() else [UNTOUCHED, UNTOUCHED | {"no entry"}]


@pytest.mark.parametrize("name,script,result", [
    ("good", None, 1),
    ("good-scripted", serve("server"), 1),
    ("wrong-CA", serve("other_server"), 0),
    ("wrong-name", serve("wrong_name"), 0),
    ("answer-N", lambda c: always_closed(scripts.after_ssl_request(close, b"N")), 0),
    ("not-TLS", lambda c: always_closed(scripts.after_client_hello("tls", close, bytes(range(256)))), 0),
])
def test_the_hosts_error_queue(openssl_guest, tmp_path, name, script, result):
    scenario = Scenario(name, "tls15", "anything", script=script, shows=f"PQcancelBlocking -> {result}")
    transcript = programs.run_ours(openssl_guest, scenario, tmp_path / "home").transcript
    assert queues_of(transcript) in EXPECTED, transcript
    assert "the host's library works: 1 1" in transcript


def test_no_root_certificate(openssl_guest, tmp_path):
    """Fails before there is a server to talk to: the root certificate is gone since the session began."""
    scenario = Scenario("no-root", "tls15", "anything", options={"sslrootcert": "{dir}/ca.crt"},
                        prepare=lambda directory, c: shutil.copy(c.ca, directory / "ca.crt"),
                        at_session=lambda directory, c: (directory / "ca.crt").write_text("nothing of the kind"),
                        shows="PQcancelBlocking -> 0")
    transcript = programs.run_ours(openssl_guest, scenario, tmp_path / "home").transcript
    assert queues_of(transcript) in EXPECTED, transcript


ENCRYPTED = {"sslcert": "{c.client_encrypted.cert}", "sslkey": "{c.client_encrypted.key}"}


def hook_scenario(name: str, run: str, answer: str | None, shows: str) -> Scenario:
    environment = {"DRIVER_PASSPHRASE": PASSPHRASE, **({} if answer is None else {"DRIVER_ANSWER": answer})}
    return Scenario(name, "tls15", run, options=ENCRYPTED, environment=environment, script=serve("server"), shows=shows)


NOT_LOADED = "could not load private key file"
SCENARIOS = [
    hook_scenario("right-answer", "hook-polled", PASSPHRASE, ", client certificate "),
    hook_scenario("right-answer", "hook-blocking", PASSPHRASE, ", client certificate "),
    hook_scenario("wrong-answer", "hook-polled", "wrong", NOT_LOADED),
    hook_scenario("wrong-answer", "hook-blocking", "wrong", NOT_LOADED),
    hook_scenario("empty-answer", "hook-polled", "", NOT_LOADED),
    hook_scenario("no-answer", "hook-polled", None, NOT_LOADED),
    hook_scenario("negative-answer", "hook-polled", "-1", NOT_LOADED),
    hook_scenario("too-long-answer", "hook-polled", "x" * 2000, NOT_LOADED),
    Scenario("key-not-encrypted", "tls15", "hook-polled", script=serve("server"),
             options={"sslcert": "{c.client.cert}", "sslkey": "{c.client.key}"}, shows="hook called: no"),
    Scenario("default-hook", "tls15", "default-hook", options={**ENCRYPTED, "sslpassword": PASSPHRASE},
             script=serve("server"), shows=", client certificate "),
    Scenario("no-hook", "tls15", "blocking", options={**ENCRYPTED, "sslpassword": PASSPHRASE}, script=serve("server"),
             shows=", client certificate "),
]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.id)
def test_passphrase_hook(guest, tmp_path, scenario, host):
    compare(guest, scenario, tmp_path / "home", host)


class Terminal:
    """A terminal on which somebody has typed the passphrase already; its echo is off, so what comes out was written."""

    def __enter__(self) -> "Terminal":
        self.screen, self.line = os.openpty()
        mode = termios.tcgetattr(self.line)
        mode[3] &= ~termios.ECHO
        termios.tcsetattr(self.line, termios.TCSANOW, mode)
        os.set_blocking(self.line, False)
        os.write(self.screen, f"{PASSPHRASE}\n".encode())
        return self

    def __exit__(self, *_exception) -> None:
        os.close(self.screen)
        os.close(self.line)

    def written(self) -> bytes:
        """A mark comes behind it: the kernel takes its time to bring it here."""
        os.write(self.line, END)
        written = b""
        while not written.endswith(END):
            written += os.read(self.screen, 1000)
        return written.removesuffix(END)

    def still_typed(self) -> bytes:
        try:
            return os.read(self.line, 1000)
        except BlockingIOError:
            return b""


@pytest.fixture
def at_terminal(guest, tmp_path):
    """As `guest`, but each program runs with the terminal that DRIVER_TERMINAL names as its controlling terminal."""
    wrapped = tmp_path / "wrapped"
    wrapped.mkdir()
    for name in ("driver-pqcancel", "driver-libpq18"):
        # The shell leads a session of its own; the first terminal that it opens becomes the session's.
        (wrapped / name).write_text(f'#!/bin/sh\n: <> "$DRIVER_TERMINAL"\nexec "{guest.build / name}" "$@"\n')
        (wrapped / name).chmod(0o755)
    yield from programs.open_laboratory(wrapped, guest.certs, guest.servers)


def test_the_terminal_is_left_alone(at_terminal, tmp_path):
    """The key got a passphrase after the session was made. libpq 18 asks for it at the terminal; pqcancel must not."""
    def install(key: str):
        return lambda directory, c: shutil.copy(getattr(c, key).key, directory / "client.key")

    with Terminal() as terminal:
        scenario = Scenario("terminal", "tls15", "blocking", script=serve("server"),
                            options={"sslcert": "{c.client.cert}", "sslkey": "{dir}/client.key"},
                            environment={"DRIVER_TERMINAL": os.ttyname(terminal.line)},
                            prepare=install("client"), at_session=install("client_encrypted"))
        ours = at_terminal.over_pqcancel(scenario, tmp_path / "home", "system")
        assert "PQcancelBlocking -> 0" in ours.transcript and "could not load private key file" in ours.transcript, ours
        assert "exit status 0" in ours.transcript and ours.stderr == ""
        assert terminal.written() == b""
        # libpq 18 finds what was typed and not taken: the experiment is sound.
        theirs = at_terminal.over_libpq18(scenario, tmp_path / "home")
        assert "PQcancelBlocking -> 1" in theirs.transcript, theirs
        assert PROMPT in terminal.written()
        assert terminal.still_typed() == b""
