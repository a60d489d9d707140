"""Programs with another OpenSSL than the system's, with an allocator of their own for it, or with one inside themselves: it
does TLS of the program's own before, between and after cancels, and nobody's symbols are mixed up with anybody's."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import pytest

import bindings
import peers
import programs
from eavesdropper import Cancels
from library import LIBRARY, has_private_openssl
from programs import BUILD

pytestmark = pytest.mark.skipif(not has_private_openssl(), reason="built on the system's OpenSSL, which is then shared")

USED = {"PQgetCancel", "PQcancel", "PQfreeCancel", "PQcancelCreate", "PQcancelStart", "PQcancelPoll", "PQcancelSocket",
        "PQcancelBlocking", "PQcancelFinish"}
CANCELS = ("blocking", "polled", "old", "blocking again")
VISITS = len(CANCELS) + 2

SYSTEM = ["-lssl", "-lcrypto"]
STATIC = ["-l:libssl.a", "-l:libcrypto.a"]


@dataclass(frozen=True)
class Kind:
    """A program: foreign_openssl.c, linked in one way."""

    openssl: str  # how its OpenSSL's name begins
    libpq: int
    libpq_connects_by: str  # pattern of the file whose SSL_connect the libpq calls
    flags: list[str]
    directory: Callable[[], Path] | None = None  # of another libpq and its OpenSSL than the system's
    own_allocator: bool = False

    def libraries(self) -> list:
        directories = [self.directory()] if self.directory else []
        found = [path for name in ("libssl*", "libcrypto*") for directory in directories for path in directory.glob(name)]
        return [*self.flags, *found, "-ldl", "-pthread"]


def embedded() -> Path:
    return peers.postgres(17) / "lib"


KINDS = {
    "1.1": Kind("OpenSSL 1.1.1", 17, r"libssl\.so\.1\.1", [], embedded),
    "newer": Kind("OpenSSL 3.5", 18, r"libssl-\w+\.so\.3", [], peers.libpq18),
    "own-allocator": Kind("OpenSSL 3.0", 15, r"libssl\.so\.3", SYSTEM, own_allocator=True),
    "own-allocator-1.1": Kind("OpenSSL 1.1.1", 17, r"libssl\.so\.1\.1", [], embedded, own_allocator=True),
    "static": Kind("OpenSSL 3.0", 15, r"libssl\.so\.3", ["-Wl,--exclude-libs,ALL", *STATIC]),
    # All of it is in the global scope, in front of whatever libpq brings along.
    "static-exported": Kind("OpenSSL 3.0", 15, "linked|preloaded",
                            ["-rdynamic", "-Wl,--whole-archive", *STATIC, "-Wl,--no-whole-archive"]),
}


def build(name: str) -> Path:
    """A directory with two programs: `linked` with pqcancel, and `preloaded`, which knows nothing of it."""
    directory = BUILD / "foreign_openssl" / name
    sources = ("foreign_openssl.c", "query.c", "session.c", "transcript.c")
    libraries = KINDS[name].libraries()
    programs.build(directory, sources, *libraries, oracle=False)
    (directory / "driver-pqcancel").replace(directory / "linked")
    programs.link_with_libpq_only(directory, sources, *libraries).replace(directory / "preloaded")
    return directory


@pytest.fixture(params=KINDS, scope="module")
def program(request):
    return KINDS[request.param], build(request.param)


@pytest.mark.parametrize("way", ["linked", "preloaded"])
def test_its_openssl_works_on(servers, certs, eavesdropper, website, program, tmp_path, way):
    kind, directory = program
    libraries = [*([programs.library_directory()] if way == "linked" else []), *([kind.directory()] if kind.directory else [])]
    environment = programs.environment(
        DRIVER_MONITOR=servers["15"].conninfo(sslmode="disable"), LD_LIBRARY_PATH=":".join(map(str, libraries)),
        LD_PRELOAD=str(LIBRARY) if way == "preloaded" else "", **bindings.told_to(tmp_path / "loader"))
    command = [directory / way, eavesdropper.conninfo(), str(website.port), certs.ca]
    result = subprocess.run(command + ["own-allocator"] * kind.own_allocator, env=environment, stdin=subprocess.DEVNULL,
                            capture_output=True, text=True, timeout=630)
    assert (result.returncode, result.stderr) == (0, ""), result
    check_transcript(result.stdout.splitlines(), kind)
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=len(CANCELS))
    check_bindings(bindings.told(tmp_path / "loader"), kind, way)


def check_transcript(lines: list[str], kind: Kind) -> None:
    assert lines[0].startswith(kind.openssl) and f"libpq {kind.libpq}, ssl=1" in lines, lines
    for name in CANCELS:
        assert f"{name}: delivered=1, allocator called 0 times, errors as before" in lines, lines
        assert f"{name}: SQLSTATE 57014" in lines, lines
    visits = [line for line in lines if line.startswith("visit ")]
    assert visits == [f"visit {number}: HTTP/1.0 200, TLSv1.3, digest ba78" for number in range(1, VISITS + 1)], lines
    assert lines[-1] == f"allocator called: {'yes' if kind.own_allocator else 'no'}"


def check_bindings(found: set[bindings.Binding], kind: Kind, way: str) -> None:
    assert bindings.trespasses(found) == set()
    assert {b.name for b in found if b.user == way and bindings.OURS.match(b.owner)} >= USED
    connects = [b.owner for b in found if b.user == "libpq.so.5" and b.name == "SSL_connect"]
    assert len(connects) == 1 and re.fullmatch(kind.libpq_connects_by, connects[0]), connects


# The control experiment: libraries by the same name that are no good guests.
INTRUDERS = [("SSL_new", "void *SSL_new(void *context); void *SSL_new(void *context) { return context; }"),
             ("SSL_connect", "extern int SSL_connect(void *); int (*address)(void *) = SSL_connect;")]


@pytest.mark.parametrize("name,source", INTRUDERS, ids=["exports", "needs"])
def test_a_bad_guest_is_seen(tmp_path, name, source):
    (tmp_path / "intruder.c").write_text(source)
    intruder = programs.cc(tmp_path / "libpqcancel.so", tmp_path / "intruder.c", "-shared", "-fPIC")
    environment = programs.environment(LD_PRELOAD=str(intruder), **bindings.told_to(tmp_path / "loader"))
    usage = subprocess.run([build("own-allocator") / "linked"], env=environment, capture_output=True, text=True, timeout=630)
    assert "usage: " in usage.stderr, usage
    assert {binding.name for binding in bindings.trespasses(bindings.told(tmp_path / "loader"))} == {name}
