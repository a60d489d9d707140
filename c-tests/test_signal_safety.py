"""PQcancel does nothing that a signal handler must not: read from the machine code, and tried."""

from __future__ import annotations

import platform
import re

import pytest

import legacy
import programs
import scripts
from comparison import Scenario
from machine_code import Code, Reach

# POSIX.1-2017, section 2.4.3, as far as PQcancel has a use for it.
ASYNC_SIGNAL_SAFE = {
    "bind", "clock_gettime", "close", "connect", "fcntl", "getpeername", "getpid", "getsockname", "getsockopt", "memchr",
    "memcmp", "memcpy", "memmove", "memset", "open", "poll", "read", "recv", "send", "setsockopt", "socket", "strlen", "write",
}
# What POSIX does not name: how C reaches errno, a bare system call (futex), what compilers make of memcmp, and a look at the
# size that malloc has written before a block.
AS_SAFE = {"__errno_location", "syscall", "bcmp", "malloc_usable_size"}

FORBIDDEN = re.compile(r"core::fmt|core::panicking|core::result::unwrap_failed|core::option::\w+_failed|core::slice::index|"
                       r"<?alloc::|<?std::|__rust_|__rdl_|rust_panic|openssl|OPENSSL|SSL_|CRYPTO_|pthread_|_Unwind_")
# It calls PQcancel of the program's own libpq, for a block that this has made.
MAY_CALL_THROUGH_A_POINTER = "pqcancel::signal_safe::call_host"

ENTRY = "pqcancel::signal_safe::cancel"


@pytest.fixture(scope="module")
def code():
    if platform.machine() != "x86_64":
        pytest.skip("the machine code is read for x86-64 only")
    return Code(programs.LIBRARY)


def unsafe(reach: Reach) -> list[str]:
    """What must not be reached in a signal handler, with the way there."""
    return [reach.way(name) for name in sorted(set(reach.imported) - ASYNC_SIGNAL_SAFE - AS_SAFE)] \
        + [reach.way(name) for name in sorted(reach.local) if FORBIDDEN.match(name)] \
        + [f"through a pointer <- {reach.way(name)}" for name in sorted(reach.indirect - {MAY_CALL_THROUGH_A_POINTER})]


def test_only_async_signal_safe_functions_are_reachable(code):
    reach = code.reach("PQcancel")
    print("functions:", *sorted(reach.local), "\nimported:", *sorted(reach.imported))
    assert unsafe(reach) == []
    # It was the right function that was walked, and to the end: the one way makes system calls, the other wakes the courier.
    assert ENTRY in reach.local
    assert {"socket", "connect", "send", "recv", "syscall"} <= set(reach.imported)
    assert reach.indirect == {MAY_CALL_THROUGH_A_POINTER}


@pytest.mark.parametrize("function", ["PQgetCancel", "PQfreeCancel", "PQcancelBlocking"])
def test_the_checker_sees_what_is_not_safe(code, function):
    """Control experiment: functions that are not for signal handlers."""
    reach = code.reach(function)
    found = unsafe(reach)
    assert {"malloc", "free"} & set(reach.imported) and len(found) > 10, found
    assert any("core::panicking" in way for way in found) and any("through a pointer" in way for way in found), found


# At run time: an allocator that aborts the process when PQcancel enters it in the thread that called PQcancel.

HANDLERS = 20
TIMEOUT = 2  # seconds, where the server says nothing


def with_certificate(name: str):
    return lambda c: programs.always_closed(scripts.with_certificate(name)(c))


def closing(script):
    return lambda c: programs.always_closed(script)


# By name: transport, script, between, and what PQcancel says.
ENDINGS = {
    "delivered": ("tcp4", legacy.real_server, None, ""),
    "delivered-unix": ("unix", legacy.real_server, None, ""),
    "delivered-tls": ("tls15", legacy.real_server, None, ""),
    "refused": ("tcp4", None, scripts.nobody_listens, "PQcancel() -- connect() failed: error 111"),
    "refused-unix": ("unix", None, scripts.socket_removed, "PQcancel() -- connect() failed: error 2"),
    "refused-tls": ("tls15", None, scripts.nobody_listens, "PQcancel() -- connect() failed: error 111"),
    "answer-N": ("tls15", closing(scripts.after_ssl_request(scripts.close, b"N")), None,
                 "PQcancel() -- server does not support SSL, but SSL was required"),
    "wrong-CA": ("tls15", with_certificate("other_server"), None, "PQcancel() -- SSL error: certificate verify failed"),
    "wrong-name": ("tls15", with_certificate("wrong_name"), None,
                   'PQcancel() -- server certificate for "elsewhere.example" does not match host name "localhost"'),
    "silence": ("tls15", closing(scripts.after_ssl_request(scripts.hold)), None, "PQcancel() -- timeout expired"),
}


@pytest.mark.parametrize("trace", ["", "{dir}/trace"], ids=["silent", "traced"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_handlers_allocate_nothing(locks, tmp_path, ending, trace):
    transport, script, between, message = ENDINGS[ending]
    environment = {"LD_PRELOAD": legacy.build_allocator(locks.build)} | ({"PQCANCEL_TRACE": trace} if trace else {})
    number = 1 if ending == "silence" else HANDLERS
    options = {"connect_timeout": str(TIMEOUT)} if ending == "silence" else {}
    scenario = Scenario(ending, transport, "handler", number, options=options, environment=environment, script=script,
                        between=between)
    _, attempts = legacy.run(locks, scenario, tmp_path / "home")
    assert attempts.refused == ({message: number} if message else {}), attempts
    assert ending != "silence" or TIMEOUT <= attempts.longest < TIMEOUT + legacy.SLACK, attempts
    if trace:
        assert (tmp_path / "home" / "trace").read_text().count("PQcancel returned") == number


def test_the_allocator_sees_what_is_not_safe(locks, tmp_path):
    """Control experiment: a handler that allocates."""
    scenario = Scenario("careless", "tcp4", "careless", environment={"LD_PRELOAD": legacy.build_allocator(locks.build)})
    outcome = locks.over_pqcancel(scenario, tmp_path / "home", "system")
    assert "exit status -6\n" in outcome.transcript
    assert outcome.stderr == "malloc was called in the thread that is in PQcancel\n"
