"""The drop-in: programs that open libpq by themselves and look its functions up in that handle, as psycopg's pure Python
form does by ctypes; and programs that are linked with libpq, which find the drop-in in its place. In front of three libpqs:
Debian's, a newer one that knows the new functions, and one with symbol versions as Red Hat's.

PQCANCEL_DROPIN names the directory under test, which stands in front of Debian's libpq. The others are made here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Callable

import pytest

import drivers
import legacy
import peers
import programs
import wire
from comparison import Scenario
from eavesdropper import Cancels
from monitor import SLEEPING
from preloaded import BIN, DROPIN, WRAPPER, Way
from programs import BUILD, LIBRARY, SOURCES
from terminal import CTRL_C, Terminal
from test_library import EXPORTS
from test_psql import WORK, assert_cancelled, begin, leave, psql

BUILD_SCRIPT = peers.ROOT / "dropin" / "build.sh"

# Those that take a PGconn. The drop-in has them itself; what else cancels is the library's.
OWN = ["PQcancelCreate", "PQgetCancel", "PQrequestCancel"]

CANCELLED = "query raised QueryCanceled canceling statement due to user request\n"


@dataclass(frozen=True)
class Host:
    """A libpq behind the drop-in."""

    name: str
    major: int
    directory: Callable[[], Path | None]  # None: where the loader finds it by itself
    searched: bool = False  # it finds what it needs only with its own directory in LD_LIBRARY_PATH
    linkable: Callable[[], Path] | None = None  # directory of one to link programs with, if not the system's
    first_version: str = ""  # of its symbols

    @property
    def dropin(self) -> Path:
        return DROPIN if self.directory() is None else make_dropin(self)

    @property
    def libpq(self) -> Path:
        """The real one."""
        return (self.dropin / "libpq-host.so.5").resolve()

    @property
    def linked_with(self) -> Path | None:
        return self.linkable() / "libpq.so.5" if self.linkable else None

    @property
    def search_path(self) -> list[Path]:
        return [self.directory()] if self.searched else []


SYSTEM = Host("system", 15, lambda: None)
# Its name in the wheel is no libpq.so.5, which programs that are linked with it would ask for.
LIBPQ_18 = Host("libpq-18", 18, peers.libpq18, searched=True, linkable=lambda: peers.postgres18() / "lib")
RHPG = Host("rhpg", 16, peers.libpq_rhpg, linkable=peers.libpq_rhpg, first_version="RHPG_9.6")
HOSTS = [SYSTEM, LIBPQ_18, RHPG]

each_host = pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)


@cache
def make_dropin(host: Host) -> Path:
    """As the manual says: of three links, unless the symbols have versions."""
    directory = BUILD / f"dropin-{host.name}"
    shutil.rmtree(directory, ignore_errors=True)
    if host.first_version:
        subprocess.run([BUILD_SCRIPT, directory, host.directory() / "libpq.so.5"], check=True)
    else:
        directory.mkdir(parents=True)
        (directory / "libpq.so.5").symlink_to(DROPIN / "libpq.so.5")
        (directory / "libpq-host.so.5").symlink_to(host.directory() / "libpq.so.5")
    (directory / "libpqcancel.so.1").symlink_to(LIBRARY)
    return directory


@dataclass(frozen=True)
class Reach(Way):
    """How the drop-in gets into the program: by the command, by the environment, or not at all."""

    how: str = ""

    def command(self, host: Host, *words) -> list[str]:
        option = "--dlopen" if host == SYSTEM else f"--dlopen={host.dropin}"
        return [str(word) for word in ((WRAPPER, option, *words) if self.how == "command" else words)]

    def searching(self, host: Host, home: Path, **more: str) -> dict[str, str]:
        """The environment. Without the drop-in, the real libpq is found where it is."""
        search_path = {"command": host.search_path, "library-path": [host.dropin, *host.search_path],
                       "without": [host.libpq.parent]}[self.how]
        if search_path:
            more["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, search_path))
        return self.environment(home, **more)


COMMAND = Reach("verify-full", preloaded=False, readable=False, how="command")
LIBRARY_PATH = Reach("verify-full", preloaded=False, readable=False, how="library-path")
IN_PLAINTEXT = Reach("disable", preloaded=False, readable=True, how="command")
# The control experiment: the library is there, and is not reached.
PRELOADED = Reach("verify-full", preloaded=True, readable=True, how="without")

REACHED = {"command": COMMAND, "library-path": LIBRARY_PATH, "plaintext": IN_PLAINTEXT}
WAYS = {**REACHED, "preloaded-only": PRELOADED}

each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
each_reached_way = pytest.mark.parametrize("way", REACHED.values(), ids=REACHED)


# psycopg without its C part.

@each_way
@pytest.mark.parametrize("host", [SYSTEM, LIBPQ_18], ids=lambda host: host.name)
@pytest.mark.parametrize("driver", [name for name in drivers.WAYS if name.startswith("psycopg_")])
def test_psycopg(monitor, eavesdropper, tmp_path, driver, host, way):
    words = [sys.executable, "-B", drivers.__file__, driver, eavesdropper.conninfo(sslmode=way.sslmode), "2"]
    environment = way.searching(host, tmp_path, PYTHONPATH=str(peers.drivers()), PYTHONUNBUFFERED="1", PSYCOPG_IMPL="python")
    with Terminal(way.command(host, *words), environment, directory=tmp_path) as terminal:
        terminal.expect(rf"psycopg 3\.3\.9 python on libpq {host.major}\d{{4}}\n")
        for _ in range(2):
            monitor.wait_for(1, eavesdropper.name, SLEEPING)
            terminal.type("now")
            terminal.expect("cancel returned\n")
            terminal.expect(CANCELLED)
        terminal.expect("answer 42\n")
        assert terminal.wait() == 0
    if host.major >= 17 and driver.endswith("safe") and way.sslmode != "disable":
        # By PQcancelStart and PQcancelPoll: libpq's own, which the server asks for another key share each time, or ours.
        assert eavesdropper.cancels == Cancels(readable=0, encrypted=2)
        assert [wire.is_retried(connection) for connection in eavesdropper.connections[1:]] == 2 * [way.readable]
    else:
        assert eavesdropper.cancels == way.shows(2)


# Programs in C.

DRIVER = ("driver.c", "session.c", "transcript.c")


def compile_by_handle(name: str, *sources: str) -> Path:
    """Directory with a driver that opens libpq by itself."""
    directory = BUILD / f"dropin-{name}"
    directory.mkdir(parents=True, exist_ok=True)
    programs.cc(directory / "driver-pqcancel", "-include", "dropin_handle.h", "-Wl,-z,defs", "-pthread",
                *(SOURCES / source for source in (*DRIVER, "dropin_handle.c", *sources)), "-lm")
    return directory


@pytest.fixture(scope="module")
def functions():
    return compile_by_handle("functions", "functions.c", "query.c") / "driver-pqcancel"


@pytest.fixture(scope="module")
def life():
    return compile_by_handle("life", "dropin.c", "query.c") / "driver-pqcancel"


@pytest.fixture(scope="module")
def plugin():
    """An object that is linked with libpq."""
    libpq = programs.pkg_config("--libs", "libpq")
    return programs.cc(BUILD / "dropin-plugin.so", SOURCES / "plugin.c", "-shared", "-fPIC", *libpq)


def told(way: Reach, host: Host, eavesdropper, home: Path, program: Path, *scenario: str, **environment: str) -> list[str]:
    """What a driver says of its scenario, and nothing else is said: not by the loader, either."""
    environment = way.searching(host, home, DRIVER_MONITOR=eavesdropper.server.conninfo(sslmode="disable"), **environment)
    result = subprocess.run(way.command(host, program, eavesdropper.conninfo(sslmode=way.sslmode), *scenario),
                            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=630)
    assert (result.returncode, result.stderr) == (0, ""), result
    first, *lines = result.stdout.splitlines()
    assert first == f"session: ssl={int(way.sslmode != 'disable')}"
    return lines


NEW = ("PQcancelBlocking", "PQcancelPoll")
OLD = ("PQcancel", "PQrequestCancel")


def assert_all_cancelled(lines: list[str], host: Host, names=NEW + OLD) -> None:
    assert lines[0].startswith(f"libpq: {host.major}0")
    assert lines[1:] == [f"{name} -> 1, query: 57014" for name in names]


@each_host
@each_reached_way
def test_every_function_looked_up(eavesdropper, functions, tmp_path, way, host):
    assert_all_cancelled(told(way, host, eavesdropper, tmp_path, functions, "cancelled"), host)
    assert eavesdropper.cancels == way.shows(4)


@pytest.mark.parametrize("way", [COMMAND, LIBRARY_PATH], ids=lambda way: way.how)
def test_with_another_libpq_in_the_process(eavesdropper, functions, tmp_path, way):
    """Whose session it is, the calls of this program do not tell: it depends on no libpq. But the drop-in does."""
    beside = str(peers.libpq18() / "libpq.so.5")
    assert_all_cancelled(told(way, SYSTEM, eavesdropper, tmp_path, functions, "cancelled", DROPIN_BESIDE=beside), SYSTEM)
    assert eavesdropper.cancels == way.shows(4)


# What is preloaded stands in the way of PQrequestCancel all the same: inside it calls PQgetCancel and PQcancel by their names.
OLD_NOT_REACHED = Cancels(readable=1, encrypted=1)


@each_host
def test_without_the_drop_in(eavesdropper, functions, tmp_path, host):
    lines = told(PRELOADED, host, eavesdropper, tmp_path, functions, "old")
    assert_all_cancelled(lines, host, OLD)
    assert eavesdropper.cancels == OLD_NOT_REACHED


def test_a_libpq_that_is_opened_by_its_path_is_not_reached(eavesdropper, functions, tmp_path):
    """A limit that is written down."""
    told(COMMAND, SYSTEM, eavesdropper, tmp_path, functions, "old", DROPIN_OPENS=str(SYSTEM.libpq))
    assert eavesdropper.cancels == OLD_NOT_REACHED


LOADED = ["loaded: libpq.so.5", "loaded: libpq-host.so.5"]


@pytest.mark.parametrize("way", [COMMAND, LIBRARY_PATH], ids=lambda way: way.how)
@pytest.mark.parametrize("scenario", ["plugin", "plugin-first"])
def test_one_libpq_also_for_those_that_are_linked_with_it(eavesdropper, life, plugin, tmp_path, scenario, way):
    lines = told(way, SYSTEM, eavesdropper, tmp_path, life, scenario, DRIVER_PLUGIN=str(plugin))
    assert lines == [cancelled("the plugin"), cancelled("the program"), *LOADED]
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=2)


def cancelled(by: str) -> str:
    return f'cancelled by {by} -> 1 "", query: 57014'


@pytest.mark.parametrize("way", [COMMAND, LIBRARY_PATH], ids=lambda way: way.how)
@pytest.mark.parametrize("used", [False, True])
def test_closed_and_opened_again(eavesdropper, life, tmp_path, used, way):
    """The drop-in stays in the process: were it gone, and the libpq that was asked for a cancel still there, that one would
    be found the next time, because it bears the same soname."""
    lines = told(way, SYSTEM, eavesdropper, tmp_path, life, "reopened", str(int(used)))
    before = [cancelled("the program")] if used else []
    assert lines == [*before, "closed", *LOADED, "opened again", *LOADED, cancelled("the program, again")]
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=1 + used)


@pytest.mark.parametrize("parent_first", [0, 1], ids=["child-first", "parent-first"])
@pytest.mark.parametrize("run,calls", [("parents-cancel", 2), ("parents-session", 2), ("own-session", 2), ("grandchild", 3)])
def test_children_cancel(certs, servers, monkeypatch, tmp_path, run, calls, parent_first):
    built = compile_by_handle("forks", "forks.c", "attempts.c", "query.c", "process_state.c")
    laboratory = programs.laboratory_of(built, certs, servers)
    monkeypatch.setattr(laboratory, "libraries", lambda _: [DROPIN])
    scenario = Scenario("child", "tls15", run, parent_first, script=legacy.real_server, shows="next query: 57014")
    try:
        outcome, attempts = legacy.run(laboratory, scenario, tmp_path / "home")
    finally:
        laboratory.close()
    assert "child: " not in outcome.transcript, outcome.transcript
    assert attempts.delivered == attempts.calls == calls + parent_first, attempts


# Programs that are linked with libpq.

@pytest.mark.parametrize("way", [COMMAND, LIBRARY_PATH], ids=lambda way: way.how)
def test_psql(monitor, eavesdropper, tmp_path, way):
    command = way.command(SYSTEM, BIN / "psql")
    with psql(eavesdropper, tmp_path, way, command, **way.searching(SYSTEM, tmp_path)) as terminal:
        for _ in range(2):
            begin(terminal, monitor, eavesdropper, WORK["pg_sleep"])
            terminal.press(CTRL_C)
            assert_cancelled(terminal)
        leave(terminal)
    assert eavesdropper.cancels == way.shows(2)


def link(host: Host, name: str, *sources) -> Path:
    """A program that needs libpq.so.5, and asks for the symbol versions of this one, if it has any. What it does not use is
    left out: an older libpq could not be linked with transcript.c, which knows the new functions."""
    libpq = [host.linked_with, "-Wl,--allow-shlib-undefined"] if host.linked_with else programs.pkg_config("--libs", "libpq")
    return programs.cc(BUILD / f"dropin-{name}-{host.name}", "-ffunction-sections", "-Wl,--gc-sections", *sources, *libpq)


@pytest.mark.parametrize("now", ["", "1"], ids=["lazily", "at-once"])
@pytest.mark.parametrize("run", ["0", "1"], ids=["PQcancel", "PQrequestCancel"])
@each_host
@each_reached_way
def test_linked_programs(eavesdropper, tmp_path, way, host, run, now):
    """With every symbol bound at the start, too. `told` sees that the loader does not miss a version."""
    program = link(host, "old", *(SOURCES / source for source in (*DRIVER, "old_functions.c")))
    lines = told(way, host, eavesdropper, tmp_path, program, "query", run, LD_BIND_NOW=now)
    assert lines[-2:] == ["result: SQLSTATE 57014", "next query: 42"]
    assert eavesdropper.cancels == way.shows(1)


def test_a_program_asks_for_versions():
    """What the test above is about, and that without the names in the drop-in the loader would have missed them."""
    program = link(RHPG, "names", "-DLINKED", SOURCES / "dropin_names.c")
    needs = readelf("--version-info", program).partition("File: libpq.so.5")[2]
    assert "Name: RHPG_9.6" in needs
    result = subprocess.run([program, ""], env={"LD_LIBRARY_PATH": f"{DROPIN}:{RHPG.dropin}"}, capture_output=True, text=True)
    assert "libpq.so.5: no version information available" in result.stderr


# Names.

def readelf(*options) -> str:
    return subprocess.run(["readelf", "--wide", *options], check=True, capture_output=True, text=True).stdout


def symbols(file: Path) -> dict[str, str]:
    """What a library exports: the names with their versions, and without the versions' own."""
    listed = subprocess.run(["nm", "--dynamic", "--defined-only", "--format=posix", file], check=True, capture_output=True,
                            text=True).stdout
    found = [line.split()[0].partition("@") for line in listed.splitlines() if line.split()[1] != "A"]
    return {name: version.strip("@") for name, _, version in found}


def objects(way: Reach, host: Host, home: Path, linked: bool, names: list[str]) -> dict[str, list[Path | None]]:
    """Where dropin_names.c found each name: by the handle, in the global scope, by the handle and a version."""
    flags = ["-DLINKED"] if linked else []
    program = link(host, "names", *flags, SOURCES / "dropin_names.c") if linked else \
        programs.cc(BUILD / "dropin-names", SOURCES / "dropin_names.c")
    result = subprocess.run(way.command(host, program, host.first_version, *names), env=way.searching(host, home),
                            capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, ""), result
    lines = result.stdout.splitlines()
    if linked:
        assert re.fullmatch(rf"linked with {host.major}\d{{4}}: PGRES_TUPLES_OK PGRES_TUPLES_OK", lines.pop(0))
    split = [line.split() for line in lines]
    return {name: [None if file == "-" else Path(file).resolve() for file in files] for name, *files in split}


@pytest.mark.parametrize("linked", [False, True], ids=["opened", "linked"])
@pytest.mark.parametrize("way", [COMMAND, LIBRARY_PATH], ids=lambda way: way.how)
@each_host
def test_every_name_means_one_function(tmp_path, host, way, linked):
    """All that the real libpq exports is the real libpq's, but for what cancels; in the handle as in the global scope. (The
    command preloads the library: there it is the first. And a linked program's copy of a variable is everybody's.)"""
    exported = symbols(host.libpq)
    assert {"PQexec", "pgresStatus", "lo_open", "PQgetCancel"} < set(exported)
    names = sorted({*exported, *EXPORTS, "PQnoSuchFunction"})
    stub, ours, real = (host.dropin / "libpq.so.5").resolve(), LIBRARY.resolve(), host.libpq
    found = objects(way, host, tmp_path, linked, names)
    assert sorted(found) == names
    for name, (in_handle, in_scope, of_version) in found.items():
        expected = stub if name in OWN else ours if name in EXPORTS else real if name in exported else None
        assert in_handle == expected, name
        if name in OWN and way.how == "command":
            assert in_scope == ours, name
        elif not (linked and name == "pgresStatus"):
            assert in_scope == expected, name
        # Who asks for the real libpq's version by dlvsym, gets the real libpq's function.
        assert of_version == (real if host.first_version and exported.get(name) == host.first_version else None), name


@each_host
def test_the_file(host):
    """It exports its own three functions and the names of the real libpq's versions, and needs the library before the libpq."""
    stub = host.dropin / "libpq.so.5"
    dynamic = readelf("--dynamic", stub)
    assert re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)[:2] == ["libpqcancel.so.1", "libpq-host.so.5"]
    assert re.findall(r"\(SONAME\).*\[(.*)\]", dynamic) == ["libpq.so.5"]
    assert re.findall(r"\(RUNPATH\).*\[(.*)\]", dynamic) == ["$ORIGIN:$ORIGIN/.."]
    assert symbols(stub) == dict.fromkeys(OWN, "")
    assert versions(stub) == versions(host.libpq)
    assert bool(versions(stub)) == bool(host.first_version)


def versions(file: Path) -> list[str]:
    defined = readelf("--version-info", file).partition("Version definition section")[2].partition("Version needs section")[0]
    return re.findall(r"Flags: (?:none|WEAK) .*Name: (\S+)", defined)


def test_the_drop_in_stands_in_front_of_the_libpq_that_the_loader_finds():
    program = link(SYSTEM, "names", "-DLINKED", SOURCES / "dropin_names.c")
    tree = subprocess.run(["ldd", program], env={"PATH": os.defpath}, capture_output=True, text=True, check=True).stdout
    assert Path(re.search(r"libpq\.so\.5 => (\S+)", tree).group(1)).resolve() == SYSTEM.libpq
