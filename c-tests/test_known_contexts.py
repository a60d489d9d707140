"""TLS contexts are kept from one cancel to the next; yet what becomes of their files takes effect at once, as in libpq 18."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import pytest

import programs
from certs import Certs
from comparison import Laboratory
from inotify import Watch
from monitor import wait_until
from programs import BUILD

# Files that were changed less long ago are read each time, because another change might not show: src/tls_files.rs.
SETTLED = 3  # seconds

OK, NOT_VERIFIED = "1 \n", "certificate verify failed"
CLIENT = {"sslcert": "{dir}/client.crt", "sslkey": "{dir}/client.key"}
# The machine's roots are in one file; the directory, which is not there, could have more.
SYSTEM = {"sslrootcert": "system"}
ROOTS = {"SSL_CERT_FILE": "{dir}/root.crt", "SSL_CERT_DIR": "{dir}/roots"}
Change = Callable[[Path, Certs], object]


@dataclass(frozen=True)
class Case:
    """Files of a session's, and what becomes of them between two cancels."""

    name: str
    change: Change
    says: str  # part of what the cancel after the change says
    options: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def install(name: str, source: str) -> Change:
    """As cp does: the same file, with other contents."""
    def change(directory: Path, certs: Certs) -> None:
        value = certs
        for part in source.split("."):
            value = getattr(value, part)
        shutil.copy(value, directory / name)
    return change


def put_in_place(name: str, source: str) -> Change:
    """As careful programs do: another file of that name."""
    def change(directory: Path, certs: Certs) -> None:
        install("new", source)(directory, certs)
        (directory / "new").rename(directory / name)
    return change


def garble(directory: Path, _certs: Certs) -> None:
    """As long as before, and with the old time."""
    path = directory / "root.crt"
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_in_directory(directory: Path, certs: Certs) -> None:
    for name in os.listdir(directory / "crls"):
        shutil.copy(certs.other_crl, directory / "crls" / name)


def move_into_directory(directory: Path, certs: Certs) -> None:
    """The root is then where it was not, and no more where it was."""
    command = ["openssl", "x509", "-noout", "-subject_hash", "-in", certs.ca]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    (directory / "roots").mkdir()
    shutil.copy(certs.ca, directory / "roots" / f"{name}.0")
    install("root.crt", "other_ca")(directory, certs)


CASES = [
    Case("root-overwritten", install("root.crt", "other_ca"), NOT_VERIFIED),
    Case("root-replaced", put_in_place("root.crt", "other_ca"), NOT_VERIFIED),
    Case("root-garbled-in-secret", garble, "could not read root certificate file"),
    Case("root-gone", lambda d, c: (d / "root.crt").unlink(), "does not exist"),
    Case("crl-replaced", put_in_place("list.crl", "other_crl"), NOT_VERIFIED, {"sslcrl": "{dir}/list.crl"}),
    Case("crl-appears", install(".postgresql/root.crl", "other_crl"), NOT_VERIFIED),
    Case("crl-in-directory-replaced", replace_in_directory, NOT_VERIFIED, {"sslcrldir": "{dir}/crls"}),
    Case("certificate-replaced", install("client.crt", "client_rsa.cert"), "does not match private key", CLIENT),
    Case("certificate-gone", lambda d, c: (d / "client.crt").unlink(), OK, CLIENT),
    Case("key-replaced", install("client.key", "client_wrong_key.key"), "key values mismatch", CLIENT),
    Case("key-readable", lambda d, c: (d / "client.key").chmod(0o644), "has group or world access", CLIENT),
    Case("key-gone", lambda d, c: (d / "client.key").unlink(), "but not private key file", CLIENT),
    Case("machine-root-replaced", put_in_place("root.crt", "other_ca"), NOT_VERIFIED, SYSTEM, ROOTS),
    Case("machine-root-moved", move_into_directory, OK, SYSTEM, ROOTS),
]


UNCHANGED = "unchanged"
LIBRARIES = ("libpq18", "pqcancel")
FILES = {"root.crt": "ca", "list.crl": "crl", "client.crt": "client.cert", "client.key": "client.key"}

MACHINE_ROOTS = Path("/etc/ssl/certs/ca-certificates.crt")
BUNDLES = 10
CONTEXT_SIZE = 3000  # KiB, at least, with the machine's roots


class Process:
    """The program on_demand, for use in a `with` statement."""

    def __init__(self, program: Path, libraries: list[Path], conninfo: str, environment: dict[str, str]):
        environment = {"LC_ALL": "C", "LD_LIBRARY_PATH": ":".join(map(str, libraries)), **environment}
        self.process = subprocess.Popen([program, conninfo], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)

    def __enter__(self) -> "Process":
        assert self._answer() == "ready\n"
        return self

    def __exit__(self, *_exception) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def cancel(self) -> str:
        print(file=self.process.stdin, flush=True)
        return self._answer()

    def memory(self) -> int:
        """What the process has taken for itself, in KiB; whether it is resident is the machine's affair."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return sum(map(int, re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+) kB$", status, re.MULTILINE)))

    def _answer(self) -> str:
        lines = []
        for line in self.process.stdout:
            if line == ".\n":
                return "".join(lines)
            lines.append(line)
        raise RuntimeError(f"the program has ended: {lines}")


@pytest.fixture(scope="module")
def laboratory(certs, servers):
    directory = programs.build(BUILD / "on_demand", ("on_demand.c", "session.c", "transcript.c"))
    yield from programs.open_laboratory(directory, certs, servers)


@pytest.fixture(scope="module")
def places(certs, tmp_path_factory) -> Path:
    """A directory for each case and library, whose files have not been changed for long enough."""
    made = tmp_path_factory.mktemp("contexts")
    bundle = certs.ca.read_bytes() + MACHINE_ROOTS.read_bytes()
    for number in range(BUNDLES):
        (made / f"bundle{number}").write_bytes(bundle)
    for place in (f"{name}-{library}" for name in [UNCHANGED, *(case.name for case in CASES)] for library in LIBRARIES):
        (made / place / ".postgresql").mkdir(parents=True)
        for name, source in FILES.items():
            install(name, source)(made / place, certs)
        shutil.copytree(certs.crl_dir, made / place / "crls")
    written = time.time()
    wait_until(lambda: time.time() > written + SETTLED)
    return made


def process(laboratory: Laboratory, library: str, home: Path, options: dict[str, str],
            environment: dict[str, str] | None = None) -> Process:
    server = laboratory.servers["15"]
    options = {"host": "localhost", "hostaddr": server.host, "sslmode": "verify-full", "sslrootcert": "{dir}/root.crt", **options}
    conninfo = server.conninfo(**{name: value.format(dir=home) for name, value in options.items()})
    host = "18" if options["sslrootcert"] == "system" else "system"  # before 16 that was a file's name
    libraries = [laboratory.oracle] if library == "libpq18" else laboratory.libraries(host)
    environment = {name: value.format(dir=home) for name, value in (environment or {}).items()}
    return Process(laboratory.build / f"driver-{library}", libraries, conninfo, {"HOME": str(home), **environment})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_change_takes_effect_at_once(laboratory, places, case):
    said = {}
    for library in LIBRARIES:
        home = places / f"{case.name}-{library}"
        with process(laboratory, library, home, case.options, case.environment) as running:
            assert [running.cancel() for _ in range(3)] == 3 * [OK]
            case.change(home, laboratory.certs)
            said[library] = running.cancel().replace(str(home), "HOME")
            assert case.says in said[library]
    assert said["pqcancel"] == said["libpq18"]


@pytest.mark.parametrize("options, environment, files", [
    (CLIENT, {}, ["root.crt", "client.crt", "client.key"]),
    (SYSTEM, ROOTS, ["root.crt"]),
], ids=["files", "machine-roots"])
def test_files_are_read_once(laboratory, places, options, environment, files):
    """And by libpq 18, the control, each time."""
    opened = {}
    for library in LIBRARIES:
        home = places / f"{UNCHANGED}-{library}"
        with process(laboratory, library, home, options, environment) as running, \
                Watch([home / name for name in files]) as watch:
            assert running.cancel() == OK
            first = watch.opened()
            assert running.cancel() == OK
            opened[library] = first, watch.opened()
    assert opened["pqcancel"] == (len(files), 0)
    assert min(opened["libpq18"]) > 0


def test_replaced_contexts_are_dropped(laboratory, places):
    """Each takes some megabytes."""
    home = places / f"{UNCHANGED}-pqcancel"
    memory = []
    link(home, places, 0)
    with process(laboratory, "pqcancel", home, {"sslrootcert": "{dir}/current"}) as running:
        for number in range(BUNDLES):
            link(home, places, number)
            assert running.cancel() == OK
            memory.append(running.memory())
    print("KiB:", *memory)
    assert memory[-1] - memory[2] < CONTEXT_SIZE < memory[0]


def link(home: Path, places: Path, number: int) -> None:
    """A file that is not written at this moment takes the other one's place."""
    (home / "next").symlink_to(places / f"bundle{number}")
    (home / "next").rename(home / "current")
