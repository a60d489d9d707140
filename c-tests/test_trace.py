"""PQCANCEL_TRACE, PQCANCEL_TIMEOUT and PQCANCEL_LEGACY: what they do, and what they never do."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

import legacy
import programs
import scripts
from comparison import Outcome, Scenario
from eavesdropper import Cancels
from legacy import SLACK, real_server
from preloaded import WRAPPER

DEFAULT = 10  # seconds that PQcancel waits at most, where nobody says otherwise
THREADS, ATTEMPTS_EACH = 8, 500  # as in traced.c
SETUID_OWNER = "daemon"

# One line: who, when, what.
LINE = re.compile(r"pqcancel\[(?P<process>\d+)\] (?P<time>\d+\.\d{6}) (?P<step>[^\x00-\x1f\x7f]+)")
DELIVERED = re.compile(r"PQcancel returned 1 after \d+ us")

TRACE_TO_FILE = {"PQCANCEL_TRACE": "{dir}/trace"}


@pytest.fixture(scope="module")
def traced(certs, servers):
    yield from programs.open_laboratory(legacy.build("traced"), certs, servers)


@pytest.fixture
def home(tmp_path) -> Path:
    """What "{dir}" stands for in a scenario."""
    return tmp_path / "home"


def steps(trace: str) -> list[str]:
    """What a trace tells, of one process, in order."""
    lines = [LINE.fullmatch(line) for line in trace.splitlines()]
    assert all(lines), trace
    assert trace.endswith("\n") or not trace
    assert len({line["process"] for line in lines}) <= 1, trace
    return [line["step"] for line in lines]


def tells(trace: str, *expected: str) -> None:
    """Fails unless these patterns are found in steps of the trace, in this order."""
    remaining = iter(steps(trace))
    for pattern in expected:
        assert any(re.search(pattern, step) for step in remaining), f"no {pattern!r} where it should be in\n{trace}"


# Its steps.

TLS_STEPS = [rf"PQgetCancel: backend \d+, encrypted, at most {DEFAULT} s", r"courier has started",
             r'connection to server at "127\.0\.0\.1", port \d+, backend \d+: CONNECTION_STARTED$', "CONNECTION_SSL_STARTUP$",
             "CONNECTION_MADE$", "CONNECTION_AWAITING_RESPONSE$", "CONNECTION_OK$", DELIVERED.pattern]
PLAINTEXT_STEPS = [r"PQgetCancel: backend \d+, in plaintext", DELIVERED.pattern]
STEPS = {"tls15": TLS_STEPS, "tls18": TLS_STEPS, "tcp4": PLAINTEXT_STEPS, "unix": PLAINTEXT_STEPS}


@pytest.mark.parametrize("transport", STEPS)
@pytest.mark.parametrize("to", ["stderr", "file"])
def test_the_steps_of_a_cancel(traced, home, transport, to):
    environment = TRACE_TO_FILE if to == "file" else {"PQCANCEL_TRACE": "stderr"}
    began = time.time()
    outcome = traced.over_pqcancel(Scenario("steps", transport, "query", environment=environment), home, "system")
    assert "query: 57014\n" in outcome.transcript and "descriptors: as before\n" in outcome.transcript, outcome
    trace, nothing = (outcome.stderr, "") if to == "stderr" else ((home / "trace").read_text(), outcome.stderr)
    assert nothing == ""
    tells(trace, *STEPS[transport])
    assert len(set(re.findall(r"backend \d+", trace))) == 1, "there is one session only"
    times = [float(LINE.fullmatch(line)["time"]) for line in trace.splitlines()]
    assert began <= times[0] and times == sorted(times) and times[-1] <= time.time()


REFUSED = {
    "nobody": {"between": scripts.nobody_listens},
    "answer-N": {"script": lambda c: programs.always_closed(scripts.after_ssl_request(scripts.close, b"N"))},
    "wrong-CA": {"script": lambda c: programs.always_closed(scripts.after_handshake(
        "tls", scripts.tls_context(c, c.other_server), scripts.close))},
    "silence": {"script": lambda c: programs.always_closed(scripts.after_ssl_request(scripts.hold))},
    # A message of two lines, which is one in the trace.
    "no-root": {"options": {"sslrootcert": "{dir}/ca.crt"}, "script": real_server,
                "prepare": lambda directory, c: shutil.copy(c.ca, directory / "ca.crt"),
                "at_session": lambda directory, c: (directory / "ca.crt").unlink()},
}


@pytest.mark.parametrize("why,transport", [*((why, "tls15") for why in REFUSED), ("nobody", "tcp4"), ("nobody", "unix")])
def test_a_refused_cancel_tells_why(traced, home, why, transport):
    environment = {**TRACE_TO_FILE, "PQCANCEL_TIMEOUT": "1" if why == "silence" else "30"}
    scenario = Scenario(why, transport, "idle", environment=environment, **REFUSED[why])
    transcript = programs.run_ours(traced, scenario, home).transcript
    message = re.search(r"^refused 1 times: PQcancel\(\) -- (.*)$", transcript, re.MULTILINE).group(1)
    trace = (home / "trace").read_text()
    tells(trace, "PQgetCancel: backend", rf"PQcancel returned 0 after \d+ us: .*{re.escape(message)}")
    assert trace.count("PQcancel returned") == 1


def test_the_new_functions_are_traced_too(traced, home):
    programs.run_ours(traced, Scenario("new", "tls15", "blocking", environment=TRACE_TO_FILE), home)
    tells((home / "trace").read_text(), *TLS_STEPS[2:-1])


# What must not be in it.

def spellings(key: int) -> set[str]:
    """A key as somebody may have written it, in either byte order."""
    found = set()
    for order in ("big", "little"):
        raw = key.to_bytes(4, order)
        for separator in ("", " ", ":", ", "):
            found |= {raw.hex(separator[:1]).replace(separator[:1], separator) if separator else raw.hex(),
                      separator.join(f"{byte:#04x}" for byte in raw)}
        found.add(", ".join(map(str, raw)))
        found |= {str(int.from_bytes(raw, "big", signed=signed)) for signed in (False, True)}
    return found | {spelling.upper() for spelling in found}


PASSWORDS = {"password": "hunter2-session", "sslpassword": "hunter2-key"}


@pytest.mark.parametrize("why,transport,legacy_value", [
    ("delivered", "tls15", ""), ("nobody", "tls15", ""), ("silence", "tls15", ""), ("delivered", "tls15", "plaintext"),
    ("nobody", "tls15", "plaintext"), ("delivered", "tcp4", ""), ("nobody", "tcp4", ""),
])
def test_no_key_and_no_password_is_in_it(traced, home, why, transport, legacy_value):
    environment = {**TRACE_TO_FILE, "PQCANCEL_LEGACY": legacy_value, "PQCANCEL_TIMEOUT": "1" if why == "silence" else "30"}
    scenario = Scenario(why, transport, "idle", environment=environment, options=PASSWORDS,
                        **REFUSED.get(why, {"script": real_server}))
    outcome = traced.over_pqcancel(scenario, home, "system")
    key = int(re.search(r"^key: (\d+)$", outcome.transcript, re.MULTILINE).group(1))
    if why == "delivered" and (transport == "tcp4" or legacy_value):  # the control: so the key looks
        assert key.to_bytes(4, "big") in outcome.connections[0].sent_by_client
    trace = (home / "trace").read_text()
    assert "PQcancel returned" in trace
    assert [secret for secret in [*spellings(key), *PASSWORDS.values()] if secret in trace] == [], trace


def test_the_spellings_of_a_key():
    assert {"12abcdef", "12 ab cd ef", "0x12, 0xab, 0xcd, 0xef", "EFCDAB12", "18, 171, 205, 239", "313249263",
            "-271733998"} <= spellings(0x12ABCDEF)


# Its file.

def run_with_file(traced, home: Path, **changes) -> Outcome:
    scenario = Scenario("file", "tls15", "idle", script=real_server, environment=TRACE_TO_FILE)
    return programs.run_ours(traced, replace(scenario, **changes), home)


def test_a_new_file_is_private(traced, home):
    before = os.umask(0)
    try:
        run_with_file(traced, home)
    finally:
        os.umask(before)
    assert stat.S_IMODE((home / "trace").stat().st_mode) == 0o600


def test_an_old_file_is_appended_to(traced, home):
    def prepare(directory: Path, _certs) -> None:
        (directory / "trace").write_text("mine\n")
        (directory / "trace").chmod(0o644)

    run_with_file(traced, home, prepare=prepare)
    trace = (home / "trace").read_text()
    assert trace.startswith("mine\npqcancel[") and DELIVERED.search(trace)
    assert stat.S_IMODE((home / "trace").stat().st_mode) == 0o644


def test_a_relative_name_is_relative_to_where_the_program_was(traced, home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run_with_file(traced, home, run="elsewhere", environment={"PQCANCEL_TRACE": "relative"})
    tells((tmp_path / "relative").read_text(), *TLS_STEPS)


@pytest.mark.parametrize("name", ["{dir}/no/such/directory/trace", "{dir}", ""])
def test_a_file_that_cannot_be_written_is_no_reason_to_fail(traced, home, name):
    outcome = run_with_file(traced, home, environment={"PQCANCEL_TRACE": name})  # which also means: nothing on stderr
    assert legacy.attempts_of(outcome.transcript).delivered == 1
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("transport", ["tls15", "tcp4"])
def test_lines_of_8_threads_are_whole(traced, home, transport):
    """Nobody listens, so that they have no time to lose."""
    scenario = Scenario("threads", transport, "threads", THREADS, sessions=THREADS, between=scripts.nobody_listens,
                        environment=TRACE_TO_FILE)
    attempts = legacy.kept_promises(programs.run_ours(traced, scenario, home).transcript)
    assert attempts.calls == THREADS * ATTEMPTS_EACH, attempts
    told = steps((home / "trace").read_text())
    assert sum(step.startswith("PQcancel returned 0 after ") for step in told) == attempts.calls


def test_without_it_nothing_is_written(traced, home):
    """Neither to stderr, which every run is held to, nor to a file in the directory the program is in."""
    outcome = run_with_file(traced, home, run="query", environment={})
    assert "descriptors: as before\n" in outcome.transcript
    assert list(home.iterdir()) == []


# Values that make no sense.

@pytest.mark.parametrize("variable,value,shown", [
    *(("PQCANCEL_TIMEOUT", value, value) for value in ("0", "3601", "-1", "+5", "1.5", "soon", " 5", "99999999999999999999")),
    ("PQCANCEL_TIMEOUT", "1\n2", "1 2"),
    ("PQCANCEL_TIMEOUT", "1\x1b[31m2", "1 [31m2"),
    ("PQCANCEL_LEGACY", "PLAINTEXT", "PLAINTEXT"),
    ("PQCANCEL_LEGACY", "1", "1"),
])
def test_a_bad_value_is_reported_and_ignored(traced, home, variable, value, shown):
    run_with_file(traced, home, environment={**TRACE_TO_FILE, variable: value})  # encrypted, which every run is held to
    trace = (home / "trace").read_text()
    tells(trace, rf"{variable}={re.escape(shown)} is ignored: ", "encrypted, at most 10 s", DELIVERED.pattern)
    assert trace.count("is ignored") == 1, trace


@pytest.mark.parametrize("variable", ["PQCANCEL_TIMEOUT", "PQCANCEL_LEGACY"])
def test_an_empty_value_is_none(traced, home, variable):
    run_with_file(traced, home, environment={**TRACE_TO_FILE, variable: ""})
    trace = (home / "trace").read_text()
    tells(trace, "encrypted, at most 10 s", DELIVERED.pattern)
    assert "is ignored" not in trace


# The bound.

@pytest.mark.parametrize("variable,connect_timeout,seconds", [
    ("1", None, 1), ("1", "3", 3), ("30", "2", 2), ("1", "0", 1), ("", None, DEFAULT),
])
def test_the_timeout(traced, home, variable, connect_timeout, seconds):
    """PQCANCEL_TIMEOUT, unless the session has a connect_timeout (0 is none)."""
    options = {"connect_timeout": connect_timeout} if connect_timeout else {}
    scenario = Scenario("timeout", "tls15", "idle", options=options, **REFUSED["silence"],
                        environment={"PQCANCEL_TIMEOUT": variable})
    attempts = legacy.kept_promises(programs.run_ours(traced, scenario, home).transcript)
    assert attempts.refused == {"PQcancel() -- timeout expired": 1}
    assert seconds <= attempts.longest < seconds + SLACK, attempts


# libpq's behaviour, for who needs it.

def test_legacy_plaintext_does_as_libpq(traced, home):
    """The same bytes as libpq 18 sends (but for the key), in the caller's thread, and no other thread."""
    scenario = Scenario("legacy", "tls15", "query", environment={"PQCANCEL_LEGACY": "plaintext"})
    ours = traced.over_pqcancel(scenario, home, "system")
    theirs = traced.over_libpq18(scenario, home)
    assert ours.wire == theirs.wire == "wire 1: CancelRequest of 16 bytes in the clear"
    for outcome in (ours, theirs):
        assert legacy.kept_promises(outcome.transcript).delivered == 1
        assert "query: 57014\n" in outcome.transcript and "threads: 1\n" in outcome.transcript, outcome.transcript


def test_without_it_there_is_a_thread_that_encrypts(traced, home):
    """Control experiment."""
    assert "threads: 2\n" in run_with_file(traced, home, run="query", environment={}).transcript


def test_it_is_for_the_old_functions_only(traced, home):
    run_with_file(traced, home, run="blocking", environment={"PQCANCEL_LEGACY": "plaintext"}, shows="PQcancelBlocking -> 1")


# A program that runs with more rights than its user.

@pytest.fixture(scope="module")
def public():
    """A directory that everybody may enter and write to, with the program in it, linked so that it finds the library when
    LD_LIBRARY_PATH is ignored."""
    with tempfile.TemporaryDirectory(prefix="pqcancel-trace-") as name:
        directory = Path(name)
        directory.chmod(0o777)
        shutil.copy(programs.LIBRARY, directory / "libpqcancel.so.1")
        built = legacy.build("traced", f"-Wl,-rpath,{directory}")
        shutil.copy(built / "driver-pqcancel", directory / "program")
        yield directory


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a setuid program is run by another user")
@pytest.mark.parametrize("mode,heeded", [(0o755, True), (0o4755, False)], ids=["ordinary", "setuid"])
def test_a_setuid_program_ignores_the_environment(public, eavesdropper, mode, heeded):
    if os.statvfs(public).f_flag & os.ST_NOSUID:
        pytest.skip(f"{public} is mounted nosuid")
    program = public / "program"
    shutil.chown(program, SETUID_OWNER)
    program.chmod(mode)
    trace = public / f"trace-{mode:o}"
    environment = {"HOME": os.devnull, "LC_ALL": "C", "PQCANCEL_TRACE": str(trace), "PQCANCEL_LEGACY": "plaintext",
                   "DRIVER_MONITOR": eavesdropper.server.conninfo(sslmode="disable")}
    result = subprocess.run([program, eavesdropper.conninfo(sslmode="require", sslrootcert=None), "query"], env=environment,
                            capture_output=True, text=True, timeout=150, user="nobody", group="nogroup", extra_groups=[])
    assert (result.returncode, result.stderr) == (0, ""), result
    assert "query: 57014\n" in result.stdout
    assert trace.exists() == heeded
    assert eavesdropper.cancels == (Cancels(readable=1, encrypted=0) if heeded else Cancels(readable=0, encrypted=1))


# All together, as a user has it.

def test_the_command_with_a_trace(traced, eavesdropper, tmp_path):
    """`pqcancel --trace=FILE PROGRAM`, with a program that is linked with libpq 18 only."""
    environment = {"HOME": str(tmp_path), "LC_ALL": "C", "LD_LIBRARY_PATH": str(traced.oracle),
                   "DRIVER_MONITOR": eavesdropper.server.conninfo(sslmode="disable")}
    run = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 150}
    command = [traced.build / "driver-libpq18", eavesdropper.conninfo(), "query"]
    straight = subprocess.run(command, **run)
    assert (straight.returncode, straight.stderr) == (0, "") and "query: 57014\n" in straight.stdout, straight
    assert eavesdropper.cancels == Cancels(readable=1, encrypted=0)
    wrapped = subprocess.run([WRAPPER, "--trace=trace", *command], **run)
    assert (wrapped.returncode, wrapped.stderr) == (0, "") and "query: 57014\n" in wrapped.stdout, wrapped
    assert eavesdropper.cancels == Cancels(readable=1, encrypted=1)
    tells((tmp_path / "trace").read_text(), *TLS_STEPS)
