"""C programs of the tests: compiled once for each run, and run under a Laboratory.

PQCANCEL_INCLUDE names the directory of pqcancel.h, PQCANCEL_BUILD where the programs are compiled.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Iterator

import peers
from comparison import TRANSPORTS, Laboratory, Outcome, Scenario
from hostile import CancelConnection, Script
from library import LIBRARY
import wire

INCLUDE = Path(os.environ.get("PQCANCEL_INCLUDE", peers.ROOT / "include")).absolute()
BUILD = Path(os.environ.get("PQCANCEL_BUILD", peers.ROOT / "target" / "c-tests")).absolute()
SOURCES = Path(__file__).resolve().parent

WARNINGS = ["-Wall", "-Wextra", "-Werror"]



def pkg_config(*what: str) -> list[str]:
    return subprocess.run(["pkg-config", *what], check=True, capture_output=True, text=True).stdout.split()


def library_directory() -> Path:
    """A directory in which the dynamic loader finds the library under test by its soname, also while this is called again."""
    directory = BUILD / "lib"
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("libpqcancel.so", "libpqcancel.so.1"):
        new = directory / f"{name}-{os.getpid()}"
        new.symlink_to(LIBRARY)
        new.rename(directory / name)
    return directory


def cc(output: Path, *arguments) -> Path:
    subprocess.run(["cc", "-std=c11", "-O1", "-g", *WARNINGS, f"-I{INCLUDE}", f"-I{SOURCES}",
                    *pkg_config("--cflags", "libpq"), *arguments, "-o", output], check=True)
    return output


def build(directory: Path, sources: tuple[str, ...], *libraries: str, oracle: bool = True) -> Path:
    """Makes a program twice, over pqcancel and over libpq 18, from the same object files, under the names that a Laboratory
    starts."""
    directory.mkdir(parents=True, exist_ok=True)
    objects = [cc(directory / Path(source).with_suffix(".o"), "-c", SOURCES / source) for source in sources]
    undefined = "-Wl,--allow-shlib-undefined"
    cc(directory / "driver-pqcancel", *objects, f"-L{library_directory()}", "-lpqcancel", *pkg_config("--libs", "libpq"),
       *libraries, undefined)
    if oracle:
        cc(directory / "driver-libpq18", *objects, f"-L{peers.libpq18()}", "-lpq", *libraries, undefined)
    return directory


def link_with_libpq_only(directory: Path, sources: tuple[str, ...], *libraries: str) -> Path:
    """Makes a program that knows nothing of pqcancel, from the object files of build(). It is linked with a libpq 18, to have
    all the functions, and may run over an older one if something stands in front of that."""
    objects = [directory / Path(source).with_suffix(".o") for source in sources]
    return cc(directory / "driver-libpq", *objects, f"-L{peers.postgres(18) / 'lib'}", "-lpq", *libraries,
              "-Wl,--allow-shlib-undefined")


FUNCTIONS = ("driver.c", "functions.c", "query.c", "session.c", "transcript.c")


def build_functions() -> Path:
    return build(BUILD / "functions", FUNCTIONS, oracle=False)


def build_driver() -> Path:
    return build(BUILD / "driver", ("driver.c", "scenarios.c", "session.c", "transcript.c"))


def build_guest() -> Path:
    return build(BUILD / "guest", ("driver.c", "guest.c", "process_state.c", "session.c", "transcript.c"), "-lm")


def build_old_functions() -> Path:
    return build(BUILD / "old_functions", ("driver.c", "old_functions.c", "session.c", "transcript.c"))


def laboratory_of(directory: Path, certs, servers) -> Laboratory:
    return Laboratory(certs, servers, directory, peers.libpq18(), library_directory() / "libpqcancel.so")


def open_laboratory(directory: Path, certs, servers) -> Iterator[Laboratory]:
    """For a fixture to yield from."""
    made = laboratory_of(directory, certs, servers)
    yield made
    made.close()


def always_closed(script: Script) -> Script:
    """A script that ends with the connection closed, also where the client goes away first: for many in one run."""
    def closing(connection: CancelConnection) -> None:
        try:
            script(connection)
        finally:
            connection.close()
    return closing


def run_ours(laboratory: Laboratory, scenario: Scenario, directory: Path) -> Outcome:
    """Runs a scenario over pqcancel, and holds it to what every run promises."""
    outcome = laboratory.over_pqcancel(scenario, directory, "system")
    both = f"{outcome.transcript}\n{outcome.stderr}"
    assert "exit status 0\n" in outcome.transcript, both
    assert outcome.stderr == "", both
    assert scenario.shows in outcome.transcript, f"no {scenario.shows!r} in:\n{both}"
    if TRANSPORTS[scenario.transport][1] != "plain":
        assert not any(wire.is_readable(connection) for connection in outcome.connections), "the request is readable"
    return outcome


def environment(**more: str) -> dict[str, str]:
    """For a program that is started by itself."""
    return {"HOME": os.devnull, "LC_ALL": "C", "LD_LIBRARY_PATH": str(library_directory()), **more}
