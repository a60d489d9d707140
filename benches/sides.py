"""The sides of the comparison: the same object file, linked with a libpq, and with pqcancel in front of libpq 18."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import peers
from figures import LIBPQ, PQCANCEL

BENCHES = Path(__file__).resolve().parent
SECONDS = 300  # for one process
FLAGS = ["-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-Werror"]


class BenchError(Exception):
    """Something that has to work did not."""


@dataclass(frozen=True)
class Side:
    name: str
    openssl: str  # its libpq's
    program: Path
    counting: Path  # the same, and counts what it allocates
    directories: tuple[Path, ...]  # of its libraries

    def environment(self, more: dict[str, str] | None = None) -> dict[str, str]:
        return {"HOME": os.devnull, "LC_ALL": "C", "PATH": os.defpath,
                "LD_LIBRARY_PATH": ":".join(map(str, self.directories)), **(more or {})}

    def measure(self, conninfo: str, *arguments, environment: dict[str, str] | None = None, counting: bool = False,
                under: tuple[str, ...] = ()) -> list[list[str]]:
        """The words that measure.c prints, by line."""
        program = self.counting if counting else self.program
        result = run([*under, program, conninfo, *arguments], self.environment(environment))
        return [line.split() for line in result.splitlines()]


@dataclass(frozen=True)
class Sides:
    """libpq and ours are compared; others are libpq 18 too, on other OpenSSLs."""

    libpq: Side
    ours: Side
    others: tuple[Side, ...]
    remarks: tuple[str, ...]

    @property
    def both(self) -> tuple[Side, ...]:
        return self.libpq, self.ours

    @property
    def all(self) -> tuple[Side, ...]:
        return *self.both, *self.others


def run(command: list, environment: dict[str, str] | None = None) -> str:
    try:
        result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError as missing:
        raise BenchError(f"{command[0]} is needed: {missing}") from missing
    if result.returncode != 0:
        raise BenchError(f"{' '.join(map(str, command))}\nended with {result.returncode}:\n{result.stdout}{result.stderr}")
    return result.stdout


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "cc"))


def pkg_config(*what: str) -> list[str]:
    return shlex.split(run(["pkg-config", *what]))


def make(library: Path, directory: Path) -> Sides:
    """Compiles into directory, and puts the library there under its soname."""
    if not library.exists():
        raise BenchError(f"{library} is not there: run make first")
    directory.mkdir(parents=True, exist_ok=True)
    objects = {name: compile_object(name, directory) for name in ("measure", "allocations")}
    libpq18 = peers.libpq18()
    lib = directory / "lib"
    lib.mkdir(exist_ok=True)
    for name in ("libpqcancel.so", "libpqcancel.so.1"):
        (lib / name).unlink(missing_ok=True)
        (lib / name).symlink_to(library.resolve())

    def side(name: str, file: str, *directories: Path, libraries: tuple[str, ...] = ("-lpq",)) -> Side:
        program, counting = directory / f"measure-{file}", directory / f"measure-{file}-counting"
        link = [*(f"-L{path}" for path in directories), *libraries, "-ldl", "-Wl,--allow-shlib-undefined"]
        run([*compiler(), objects["measure"], *link, "-o", program])
        run([*compiler(), objects["measure"], objects["allocations"], "-rdynamic", *link, "-o", counting])
        openssl = openssl_of(directories[-1])
        return Side(name or f"libpq 18 on {openssl}", openssl, program, counting, directories)

    libpq = side(LIBPQ, "libpq18", libpq18)
    ours = side(PQCANCEL, "pqcancel", lib, libpq18, libraries=("-lpqcancel", "-lpq"))
    embedded = peers.postgres18() / "lib"
    others, remarks = [side("", "libpq18-embedded", embedded)], []
    try:
        others.append(side("", "libpq18-system", link_with_system_openssl(embedded, directory)))
    except BenchError as error:
        remarks.append(f"No libpq 18 on the system's OpenSSL here: {str(error).strip().splitlines()[-1]}")
    return Sides(libpq, ours, tuple(others), tuple(remarks))


def compile_object(name: str, directory: Path, *flags: str) -> Path:
    made = directory / f"{name}.o"
    run([*compiler(), *FLAGS, *flags, f"-I{BENCHES.parent / 'include'}", *pkg_config("--cflags", "libpq"), "-c",
         BENCHES / f"{name}.c", "-o", made])
    return made


def link_with_system_openssl(embedded: Path, directory: Path) -> Path:
    """A libpq.so.5 of the embedded package's static libpq, which was compiled for OpenSSL 1.1.1, on the system's OpenSSL.
    The two differ in the name of one function that libpq calls (renamed.c)."""
    made = directory / "libpq-system-openssl"
    made.mkdir(exist_ok=True)
    run([*compiler(), "-shared", "-Wl,-soname,libpq.so.5", "-Wl,-z,defs", compile_object("renamed", directory, "-fPIC"),
         "-Wl,--whole-archive", embedded / "libpq.a", "-Wl,--no-whole-archive", embedded / "libpgcommon_shlib.a",
         embedded / "libpgport_shlib.a", "-lssl", "-lcrypto", "-lm", "-o", made / "libpq.so.5"])
    (made / "libpq.so").unlink(missing_ok=True)
    (made / "libpq.so").symlink_to("libpq.so.5")
    return made


def openssl_of(directory: Path) -> str:
    """What the libcrypto that a libpq in directory is bound to calls itself."""
    environment = {"LD_LIBRARY_PATH": str(directory), "PATH": os.defpath}
    bound = run(["ldd", directory / "libpq.so.5"], environment)
    path = re.search(r"libcrypto\S* => (\S+)", bound)
    return openssl_in(Path(path.group(1))) if path else "no OpenSSL"


def openssl_in(file: Path) -> str:
    """The version that a file with OpenSSL inside carries."""
    found = re.search(rb"OpenSSL (\d+\.\d+\.\d+[a-z]*) +\d+ \w+ \d{4}", file.read_bytes())
    return f"OpenSSL {found.group(1).decode()}" if found else "OpenSSL of the system"
