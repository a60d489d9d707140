"""A GSSAPI library that lets its callers down when a session is to be cancelled, over libpq 18 and over pqcancel."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import legacy
import peers
import programs
import wire
from comparison import Laboratory, Scenario, cases, compare
from programs import BUILD, SOURCES

SEALED = "wire 1: GSSENCRequest, token, packet of 76 bytes"
# What weak_gssapi.c does not do for the cancel, and what is shown then.
WEAKNESSES = {
    "confidentiality": "outgoing GSSAPI message would not use confidentiality",
    "wrap": "GSSAPI wrap error: Unspecified GSS failure.",
    "large-packet": "client tried to send oversize GSSAPI packet (20000 > 16380)",
    "large-token": "client tried to send oversize GSSAPI packet (80000 > 65532)",
    # Kerberos encrypts although it was not asked to: that counts, and not what was asked for.
    "flags": SEALED,
    # Wilful differences: libpq 18 does not ask what became of what it had asked for.
    "told-confidentiality": SEALED,
    "told-mutual": SEALED,
    "end": SEALED,
}
SCENARIOS = [Scenario(f"weak-{name}", "gss", run, environment={"WEAK_GSSAPI": name}, shows=shows)
             for name, shows in WEAKNESSES.items() for run in ("polled", "blocking")]
SYSTEM = "libgssapi_krb5.so.2"


def stand_in_front(real: Path, directory: Path) -> None:
    """Builds weak_gssapi.c under the real library's name. It is linked with an empty library whose soname is the real one's
    path, for the linker takes a library by its soname only."""
    stub, script = directory / "stub.so", directory / "version"
    script.write_text("gssapi_krb5_2_MIT { global: gss_*; local: *; };\n")
    programs.cc(stub, "-shared", f"-Wl,-soname,{real}", "-x", "c", "/dev/null")
    programs.cc(directory / real.name, SOURCES / "weak_gssapi.c", "-shared", "-fPIC", "-pthread",
                f"-Wl,-soname,{real.name}", f"-Wl,--version-script={script}", "-Wl,--no-as-needed", stub)
    stub.unlink()


@pytest.fixture(scope="module")
def weak(drivers, certs, gss_servers):
    """As `gss`, with a weak library in front of the oracle's and of Debian's."""
    directory = BUILD / "weak_gssapi"
    oracle = directory / "oracle"
    link(drivers, "driver-*", directory)
    link(peers.libpq18().absolute(), "*", oracle)
    private, = oracle.glob("libgssapi_krb5*")
    real = private.resolve()
    private.unlink()
    stand_in_front(real, oracle)
    stand_in_front(system_library(), directory)
    made = Laboratory(certs, gss_servers, directory, oracle, programs.library_directory() / "libpqcancel.so")
    yield made
    made.close()


@pytest.fixture(scope="module")
def weak_old(weak, certs, gss_servers):
    """As `weak`, with old_functions.c in the driver's place."""
    directory = BUILD / "weak_gssapi-old"
    link(programs.build_old_functions(), "driver-*", directory)
    link(weak.build, SYSTEM, directory)
    yield from programs.open_laboratory(directory, certs, gss_servers)


def link(source: Path, pattern: str, target: Path) -> None:
    """Makes links to files of a directory in another one."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.glob(pattern):
        (target / file.name).unlink(missing_ok=True)
        (target / file.name).symlink_to(file)


def system_library() -> Path:
    """Where the loader finds what Debian's libpq needs."""
    listed = subprocess.run(["ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    return Path(re.search(rf"{re.escape(SYSTEM)} \(libc6,x86-64\) => (\S+)", listed).group(1))


@pytest.mark.parametrize("scenario,host", cases(SCENARIOS))
def test_same_as_libpq18(weak, tmp_path, scenario, host):
    compare(weak, scenario, tmp_path / "home", host)


def test_a_lock_that_the_program_holds(weak_old, tmp_path):
    """As where a signal handler calls PQcancel while the program is inside the library. What that was told to have come to
    nothing is not sent when the lock is released (with the session), and is closed; what comes after it is sent."""
    scenario = Scenario("weak-lock", "gss", "often", 1, environment={"WEAK_GSSAPI": "lock", **legacy.PATIENT},
                        shows=f'PQcancel -> 0 errno kept, errbuf "{legacy.STUCK}\\n"')
    outcome = programs.run_ours(weak_old, scenario, tmp_path / "home")
    assert "PQcancel -> 1 " in outcome.transcript and "descriptors: +0" in outcome.transcript, outcome.transcript
    given_up, sent = map(wire.summary, outcome.connections)
    assert given_up in ("GSSENCRequest", "GSSENCRequest, token") and f"wire 1: {sent}" == SEALED, outcome.wire
