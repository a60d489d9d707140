"""Runs one scenario over libpq 18 and over pqcancel, and compares what they show and what they put on the wire."""

from __future__ import annotations

import difflib
import fcntl
import fnmatch
import shutil
import subprocess
import termios
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import pytest

from certs import Certs
from hostile import CancelConnection, Proxy, Run, Script
from library import has_private_openssl
from server import Postgres, conninfo
import peers
import wire

# Which server, how the session is encrypted, and over what it goes. "direct" needs a server and a libpq of 17 or later, "gss"
# a Laboratory whose server knows a Kerberos realm.
TRANSPORTS = {
    "tcp4": ("15", "plain", "tcp4"),
    "tcp6": ("15", "plain", "tcp6"),
    "unix": ("15", "plain", "unix"),
    "abstract": ("15", "plain", "abstract"),
    "plain18": ("18", "plain", "tcp4"),
    "tls15": ("15", "tls", "tcp4"),
    "tls6": ("15", "tls", "tcp6"),
    "tls18": ("18", "tls", "tcp4"),
    "direct18": ("18", "direct", "tcp4"),
    "gss": ("gss", "gss", "tcp4"),
}

# The libpq below pqcancel: Debian's own, and the oracle's, for what only that knows. (Also "17": see libraries.)
HOSTS = ("system", "18")
NEEDS_LIBPQ_18 = ("sslnegotiation", "sslcertmode", "sslkeylogfile", "max_protocol_version", "load_balance_hosts")


# Scenarios of the driver that leave connections off in mid-flight.
IN_FLIGHT = ("mixed-resets", "finish-in-flight", "half-open-session")


@dataclass(frozen=True)
class Scenario:
    """One thing that a client may do, or that may happen to it."""

    name: str
    transport: str
    run: str = "polled"  # a scenario of driver.c
    number: int = 0
    # Conninfo options. "{c.xxx}" stands for a file of Certs and "{dir}" for a directory that is fresh for each run and is
    # also $HOME; PORT in `port` for the proxy's.
    options: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    shows: str = ""  # what libpq 18 must show: proof that the scenario is about what it claims
    script: Callable[[Certs], Script] | None = None  # None: the real server answers
    gates: str = ""
    sessions: int = 1
    between: Callable[[Run], bool] | None = None
    prepare: Callable[[Path, Certs], None] | None = None  # fills {dir}
    at_session: Callable[[Path, Certs], None] | None = None  # changes {dir} between the session and the cancel
    check: Callable[[Path], None] | None = None  # looks at {dir} after our run
    only_host: str = ""

    @property
    def id(self) -> str:
        return f"{self.name}-{self.run}{self.number or ''}-{self.transport}"

    @property
    def hosts(self) -> tuple[str, ...]:
        if self.transport == "direct18" or any(option in self.options for option in NEEDS_LIBPQ_18) \
                or self.options.get("sslrootcert") == "system":
            return ("18",)
        return (self.only_host,) if self.only_host else HOSTS


@dataclass(frozen=True)
class Difference:
    """A wilful difference: what libpq 18 shows, what pqcancel shows, and why. fnmatch pattern over scenario IDs."""

    pattern: str
    libpq18: str
    ours: str
    why: str
    on_the_wire: bool = False  # else both send the same


NO_TLS = "server does not support SSL, but SSL was required"
STALE_ERRNO = "could not send cancel packet: Resource temporarily unavailable"
GSS_ERROR = "server sent an error response during GSS encryption exchange"
SERVER_CLOSED = "server closed the connection unexpectedly"

ONE_WAY = "a GSSAPI session is cancelled over GSSAPI, or not at all"
HAS_A_REASON = "every failure has a reason"
NO_WORDS = "who has not proven to be the server puts no words into our mouth"
HAS_SPOKEN = "a server that has spoken or closed already will not take the request"
NOT_WAITED = "what is empty is no good, and nothing more is waited for"
ABOUT_ANOTHER = "the second line is about something else"
NOT_AS_ASKED = "GSSAPI security context without mutual authentication or confidentiality"

OVER_GSSAPI = [
    Difference("old-gss-*", "wire 1: CancelRequest of", "wire 1: GSSENCRequest", ONE_WAY, on_the_wire=True),
    Difference("gss-refused-*-disable-*", "in the clear", "GSS", ONE_WAY, on_the_wire=True),
    Difference("gss-refused-*-prefer-*", "ClientHello", "GSS", ONE_WAY, on_the_wire=True),
    Difference("*-as-preferred-*-gss", "-> OK  status=OK", "GSSAPI", ONE_WAY, on_the_wire=True),
    Difference("*G*-then-fin-*-gss", 'failed: "', SERVER_CLOSED, HAS_A_REASON),
    Difference("empty-token-*-gss", "", "could not initiate GSSAPI security context: ", NOT_WAITED),
    Difference("*token*-then-close-*-gss", 'failed: "', SERVER_CLOSED, HAS_A_REASON),
    Difference("token-error-in-words-*", 'failed: forged text\\n"', GSS_ERROR, NO_WORDS),
    Difference("token-error-*", 'failed: \\n"', GSS_ERROR, NO_WORDS),
    Difference("unasked-text-*", "packet of 76 bytes", "oversize GSSAPI packet", HAS_SPOKEN, on_the_wire=True),
    Difference("*-at-made-gss-*", "status=OK", SERVER_CLOSED, HAS_SPOKEN),
    Difference("answered-empty-packet-*-gss", "", "GSSAPI unwrap error: ", NOT_WAITED),
    Difference("*-in-other-words-*", ": Unknown code 0", ": Success", "the words are those of the host's own Kerberos library"),
    Difference("weak-[cw]*", STALE_ERRNO, "GSSAPI", ABOUT_ANOTHER),
    Difference("weak-large-packet-*", STALE_ERRNO, "GSSAPI", ABOUT_ANOTHER),
    Difference("weak-told-*", "packet of 76 bytes", NOT_AS_ASKED, "a context must have what was asked for", on_the_wire=True),
    Difference("weak-end-*", "packet of 76 bytes", NOT_AS_ASKED, "a context must have what was asked for", on_the_wire=True),
]

DIFFERENCES = [
    Difference("answer-N-prefer-*", "in the clear", NO_TLS, "a TLS session is never cancelled in the clear", on_the_wire=True),
    Difference("tls-fails-prefer-*", "in the clear", "certificate verify failed",
               "a TLS session is never cancelled in the clear", on_the_wire=True),
    Difference("sslmode-allow-*", "wire 1: CancelRequest of 16 bytes in the clear", "wire 1: SSLRequest, ClientHello",
               "a TLS session is never cancelled in the clear", on_the_wire=True),
    Difference("plain-session-prefer-*", "wire 1: SSLRequest, ClientHello", "wire 1: CancelRequest of 16 bytes in the clear",
               "a session in the clear is cancelled in the clear, a round trip less", on_the_wire=True),
    Difference("old-tls-*", "wire 1: CancelRequest of", "wire 1: ", "PQcancel of a TLS session is encrypted", on_the_wire=True),
    Difference("bare-eof-*", "SSL error: unexpected eof while reading", "status=OK",
               "the request was sent and the server closed: that is success with and without close_notify"),
    Difference("reset-at-made-polled-[tu][cn]*", "status=OK", SERVER_CLOSED, "a request that could not be sent is a failure"),
    Difference("close-at-made-polled-unix", "status=OK", SERVER_CLOSED, "a request that could not be sent is a failure"),
    Difference("client-key-encrypted-no-password-*", "Enter PEM pass phrase:", "could not load private key file",
               "a library that asks on the terminal stops its program"),
    Difference("negative-answer-hook-*", "interrupted or cancelled", "bad decrypt",
               "a passphrase hook's answer below zero counts as no passphrase"),
    Difference("answer-zero-*", "negotiation: \"", "negotiation: \\n\"", "every message ends in a newline, also one that shows a NUL"),
    *OVER_GSSAPI,
    Difference("null-poll-and-reset-*", "exit status -11", "survived\nexit status 0", "libpq crashes"),
]

# With OPENSSL=system the library has the machine's OpenSSL, and libpq 18 a newer one.
DIFFERENCES_OF_OPENSSL = [
    Difference("not-TLS-alert-*", "ssl/tls alert handshake failure", "sslv3 alert handshake failure",
               "OpenSSL 3.0 words it so"),
    Difference("min-1-too-old-*", "versions=0304+0303)", "versions=0304+0303+0302+0301)",
               "OpenSSL 3.0 offers, at Debian's security level, what newer ones do not", on_the_wire=True),
]


@dataclass
class Outcome:
    """What came of one run."""

    transcript: str
    stderr: str
    connections: list[CancelConnection]
    in_flight: bool  # left off somewhere: then what the other side has seen of it depends on timing

    @property
    def wire(self) -> str:
        # One that was given up before it sent anything may not even have been accepted.
        used = [] if self.in_flight else [c for c in self.connections if c.sent_by_client]
        return "\n".join(f"wire {c.number}: {wire.summary(c)}" for c in used)

    @property
    def report(self) -> str:
        return self.transcript + self.wire

    def shows(self, text: str) -> bool:
        return text in (self.report + self.stderr).replace('\\"', '"')


class Laboratory:
    """What scenarios need: servers, certificates, drivers, and one proxy for each server and transport."""

    def __init__(self, certs: Certs, servers: dict[str, Postgres], build: Path, oracle: Path, library: Path):
        self.certs, self.servers, self.build, self.oracle, self.library = certs, servers, build, oracle, library
        self.proxies: dict[tuple[str, str], Proxy] = {}

    def proxy(self, server: str, family: str) -> Proxy:
        key = (server, family)
        if key not in self.proxies:
            self.proxies[key] = Proxy(self.servers[server], family).__enter__()
        return self.proxies[key]

    def close(self) -> None:
        for proxy in self.proxies.values():
            proxy.__exit__()

    def over_libpq18(self, scenario: Scenario, directory: Path) -> Outcome:
        return self._run(scenario, directory, self.build / "driver-libpq18", [self.oracle])

    def over_pqcancel(self, scenario: Scenario, directory: Path, host: str, terminal: int | None = None) -> Outcome:
        """terminal: a descriptor that becomes the controlling terminal; without it there is none."""
        return self._run(scenario, directory, self.build / "driver-pqcancel", self.libraries(host), terminal)

    def libraries(self, host: str) -> list[Path]:
        """Where driver-pqcancel finds its libraries, over Debian's libpq, psycopg2's or the oracle's."""
        below = {"system": [], "17": [peers.libpq17()], "18": [self.oracle]}
        return [self.build, self.library.parent, *below[host]]

    def _run(self, scenario: Scenario, directory: Path, driver: Path, libraries: list[Path],
             terminal: int | None = None) -> Outcome:
        server, _, family = TRANSPORTS[scenario.transport]
        proxy = self.proxy(server, family)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        if scenario.prepare:
            scenario.prepare(directory, self.certs)
        script = scenario.script(self.certs) if scenario.script else CancelConnection.pass_through
        with Run(proxy, script, scenario.sessions, scenario.between) as run:
            command = [driver, self._conninfo(scenario, directory, proxy), scenario.run, str(scenario.number)]
            process = subprocess.Popen(
                command, env=self._environment(scenario, directory, libraries, run), text=True, start_new_session=True,
                pass_fds=[run.driver_control.fileno()], stdin=subprocess.DEVNULL if terminal is None else terminal,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                preexec_fn=None if terminal is None else lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
            try:
                run.driver_control.close()
                if scenario.at_session:
                    run.at_gate("session", lambda: scenario.at_session(directory, self.certs))
                transcript, stderr = process.communicate(timeout=630)
            finally:
                process.kill()
                process.wait()
            return Outcome(f"{transcript}exit status {process.returncode}\n", stderr, run.cancels,
                           scenario.run in IN_FLIGHT)

    def _conninfo(self, scenario: Scenario, directory: Path, proxy: Proxy) -> str:
        _, start, family = TRANSPORTS[scenario.transport]
        options = {"host": proxy.host, "port": proxy.port, "user": "postgres", "dbname": "postgres"}
        if start == "plain":
            options["sslmode"] = "disable"
        elif start == "gss":
            options.update(host="localhost", hostaddr=proxy.host, gssencmode="require")
        else:
            options.update(host="localhost", hostaddr=proxy.host, sslmode="verify-full", sslrootcert="{c.ca}")
        if start == "direct":
            options["sslnegotiation"] = "direct"
        options.update(scenario.options)
        values = {name: _filled(value, self.certs, directory) for name, value in options.items()}
        values["port"] = str(values["port"]).replace("PORT", str(proxy.port))
        return conninfo(**values)

    def _environment(self, scenario: Scenario, directory: Path, libraries: list[Path], run: Run) -> dict[str, str]:
        gates = [gate for gate in (scenario.gates, "session" if scenario.at_session else "") if gate]
        server = run.proxy.server
        monitor = {"host": server.socket_dir} if TRANSPORTS[scenario.transport][1] == "gss" else {"sslmode": "disable"}
        environment = {
            "HOME": str(directory),
            "LC_ALL": "C",
            "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
            "DRIVER_CONTROL_FD": str(run.driver_control.fileno()),
            "DRIVER_GATES": ",".join(gates),
            "DRIVER_MONITOR": server.conninfo(**monitor),
            **server.client_environment,
        }
        return {**environment, **{k: _filled(v, self.certs, directory) for k, v in scenario.environment.items()}}


def _filled(value, certs: Certs, directory: Path):
    return value.format(c=certs, dir=directory) if isinstance(value, str) else value


def cases(scenarios: list[Scenario]) -> list:
    """Parameters for a test of (scenario, host)."""
    return [pytest.param(s, host, id=f"{s.id}-host{host}") for s in scenarios for host in s.hosts]


@dataclass
class Tally:
    compared: int = 0
    wilful: int = 0


tally = Tally()


def _side_by_side(theirs: Outcome, ours: Outcome) -> str:
    """Both reports in one, as a unified diff of everything."""
    reports = [(outcome.report + "\n" + outcome.stderr).splitlines() for outcome in (theirs, ours)]
    return "\n".join(difflib.unified_diff(*reports, "libpq 18", "pqcancel", lineterm="", n=1000)) or "\n".join(reports[0])


def difference_of(scenario: Scenario) -> Difference | None:
    known = DIFFERENCES if has_private_openssl() else DIFFERENCES + DIFFERENCES_OF_OPENSSL
    return next((d for d in known if fnmatch.fnmatch(scenario.id, d.pattern)), None)


def compare(laboratory: Laboratory, scenario: Scenario, directory: Path, host: str) -> None:
    """Fails with both reports where they differ, except for a wilful difference, which must be as the table says."""
    theirs = laboratory.over_libpq18(scenario, directory)
    ours = laboratory.over_pqcancel(scenario, directory, host)
    both = "\n" + _side_by_side(theirs, ours)
    assert theirs.shows(scenario.shows), f"libpq 18 does not show {scenario.shows!r}{both}"
    difference = difference_of(scenario)
    if difference:
        assert theirs.shows(difference.libpq18), f"libpq 18 should show {difference.libpq18!r}{both}"
        assert ours.shows(difference.ours), f"pqcancel should show {difference.ours!r}{both}"
        assert difference.on_the_wire or theirs.wire == ours.wire, f"something else is sent{both}"
        assert theirs.report != ours.report, f"no difference any more: {difference}{both}"
    else:
        assert theirs.report == ours.report, f"different{both}"
        assert "exit status 0\n" in ours.report, f"the driver failed{both}"
    if TRANSPORTS[scenario.transport][1] != "plain":
        for connection in ours.connections:
            assert not wire.is_readable(connection), f"the cancel request is readable{both}"
            assert not wire.is_retried(connection), f"the handshake took a HelloRetryRequest{both}"
    else:  # the control: what is readable is seen to be
        for connection in ours.connections:
            assert wire.is_readable(connection) == ("in the clear" in wire.summary(connection)), both
    if scenario.check:
        scenario.check(directory)
    tally.compared += 1
    tally.wilful += difference is not None
