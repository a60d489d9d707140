"""Fixtures of the C tests: servers, certificates, and the drivers, compiled once for each run.

PQCANCEL_LIB names the library under test, PQCANCEL_INCLUDE the directory of pqcancel.h, PQCANCEL_BUILD where the drivers
are compiled.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

import certs as certs_module
import comparison
import peers
from comparison import Laboratory
from server import Postgres

LIBRARY = Path(os.environ.get("PQCANCEL_LIB", peers.ROOT / "target" / "release" / "libpqcancel.so")).absolute()
INCLUDE = Path(os.environ.get("PQCANCEL_INCLUDE", peers.ROOT / "include")).absolute()
BUILD = Path(os.environ.get("PQCANCEL_BUILD", peers.ROOT / "target" / "c-tests")).absolute()
SOURCES = Path(__file__).resolve().parent

# Two databases that know only one way in: a session with sslmode=allow must end up with TLS in the one, and one with
# sslmode=prefer without it in the other.
HBA = """
hostnossl tls_only   all all reject
hostssl   plain_only all all reject
local     all        all     trust
host      all        all all trust
"""


def pytest_configure():
    """A run that is told to end stops its servers too, as after Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def certs(tmp_path_factory):
    return certs_module.make(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="session")
def servers(certs):
    """By major version: "15" stands for whatever Debian has."""
    with ExitStack() as stack:
        running = {name: stack.enter_context(Postgres(prefix, certs, hba=HBA))
                   for name, prefix in (("15", peers.postgres_system()), ("18", peers.postgres18()))}
        for name in ("tls_only", "plain_only"):
            subprocess.run(["psql", "--no-psqlrc", "--quiet", "--command", f"create database {name}",
                            running["15"].conninfo()], check=True)
        yield running


@pytest.fixture(scope="session")
def drivers():
    """Directory with driver-libpq18 and driver-pqcancel: the same object files, linked twice."""
    if not LIBRARY.exists():
        pytest.exit(f"{LIBRARY} is not there: build it first", returncode=2)
    BUILD.mkdir(parents=True, exist_ok=True)
    objects = [_compile(name) for name in ("driver", "scenarios", "session", "transcript")]
    _link("driver-libpq18", objects, [f"-L{peers.libpq18()}", "-lpq", "-Wl,--allow-shlib-undefined"])
    # By the file's name, so that a library that is not called libpqcancel.so can be put under test too.
    _link("driver-pqcancel", objects, [f"-L{LIBRARY.parent}", f"-l:{LIBRARY.name}", *_pkg_config("--libs"),
                                       "-Wl,--allow-shlib-undefined"])
    soname = BUILD / "libpqcancel.so.1"  # what the driver looks for, whatever the file is called
    soname.unlink(missing_ok=True)
    soname.symlink_to(LIBRARY)
    return BUILD


@pytest.fixture(scope="session")
def laboratory(drivers, certs, servers):
    made = Laboratory(certs, servers, drivers, peers.libpq18(), LIBRARY)
    yield made
    made.close()


def pytest_terminal_summary(terminalreporter):
    tally = comparison.tally
    if tally.compared:
        terminalreporter.write_line(f"{tally.compared} scenarios compared with libpq 18, {tally.wilful} of them wilful "
                                    f"differences ({len(comparison.DIFFERENCES)} kinds)")


def _compile(name: str) -> Path:
    made = BUILD / f"{name}.o"
    subprocess.run(["cc", "-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}", *_pkg_config("--cflags"),
                    "-c", SOURCES / f"{name}.c", "-o", made], check=True)
    return made


def _link(name: str, objects: list[Path], libraries: list[str]) -> None:
    subprocess.run(["cc", *objects, "-o", BUILD / name, *libraries], check=True)


def _pkg_config(what: str) -> list[str]:
    return subprocess.run(["pkg-config", what, "libpq"], check=True, capture_output=True, text=True).stdout.split()
