"""One Python process with three libpqs, each loaded privately: psycopg2's 17 and psycopg's 18 with an OpenSSL of their own,
and the system's 15 through ctypes. That one is reached by the drop-in, because LD_PRELOAD does not reach it."""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from contextlib import contextmanager

import pytest

import bindings
import peers
import programs
import several_libpqs
from eavesdropper import Cancels
from monitor import SLEEPING
from preloaded import TLS, WITHOUT, WRAPPER
from programs import BUILD, SOURCES
from terminal import Terminal
from website import GREETING, Website

SYSTEM = "libpq.so.5"
OPEN = {"psycopg2": "", "psycopg": "", "system": f" {SYSTEM}"}
VERSIONS = {"psycopg2": 17, "psycopg": 18, "system": 15}
# Their files: those of wheels bear a digest in their names, and the loader knows the system's by the drop-in's link.
FILES = {"psycopg2": re.compile(r"libpq-\w+\.so\.5\.17"), "psycopg": re.compile(r"libpq-\w+\.so\.5\.18"),
         "system": re.compile(r"libpq(\.so\.5\.15|-host\.so\.5)")}
THREE = tuple(OPEN)
ORDERS = list(itertools.permutations(THREE))

ABC = hashlib.sha256(b"abc").hexdigest()[:8]
CTRL_D = b"\x04"  # the end of the input
# A caller that no libpq belongs to, such as libffi, and several libpqs that it may mean.
AMBIGUOUS = "pqcancel cannot tell which of the several libpqs in this process is in use"


class Python:
    """several_libpqs.py at work."""

    def __init__(self, terminal: Terminal, monitor, eavesdropper, website: Website | None):
        self.terminal, self.monitor, self.eavesdropper, self.website = terminal, monitor, eavesdropper, website

    @classmethod
    @contextmanager
    def at_work(cls, way, conninfo: str, directory, monitor, eavesdropper, website=None, dlopen=True, **more: str):
        """Its sessions are on conninfo; it ends as it should."""
        environment = way.environment(directory, PYTHONPATH=str(peers.drivers()), PYTHONUNBUFFERED="1", **more)
        words = [sys.executable, "-B", several_libpqs.__file__, conninfo]
        if way.preloaded and dlopen:
            environment.pop("LD_PRELOAD")
            words = [WRAPPER, "--dlopen", *words]
        with Terminal(words, environment, directory=directory) as terminal:
            yield cls(terminal, monitor, eavesdropper, website)
            terminal.press(CTRL_D)
            assert terminal.wait() == 0

    def does(self, command: str, expected: str) -> None:
        assert self.told(command) == expected, command

    def told(self, command: str) -> str:
        self.terminal.type(command)
        return self.terminal.expect(f"\n{re.escape(command)}: ([^\n]*)\n").group(1)

    def open(self, name: str, words: str | None = None, version: int | None = None) -> None:
        self.does(f"open {name}{OPEN[name] if words is None else words}", f"on libpq {version or VERSIONS[name]}")

    def query(self, *names: str) -> None:
        """All of them have nothing else to do."""
        for name in names:
            self.does(f"query {name}", "begins")
        self.sleeping(len(names))

    def sleeping(self, count: int) -> None:
        self.monitor.wait_for(count, self.eavesdropper.name, SLEEPING)

    def cancel(self, name: str, verb: str = "cancel") -> None:
        """Its query ends, and no other."""
        left = self.monitor.sessions(self.eavesdropper.name, SLEEPING) - 1
        self.does(f"{verb} {name}", "delivered")
        self.does(f"end {name}", "57014, 42")
        self.sleeping(left)

    def cancel_alone(self, name: str, verb: str = "cancel") -> None:
        self.query(name)
        self.cancel(name, verb)

    def visits(self) -> None:
        """By Python's own OpenSSL, which verifies the website."""
        self.does(f"visit {self.website.port} {self.website.certs.ca}", f"{GREETING} {ABC}")
        assert "CERTIFICATE_VERIFY_FAILED" in self.told(f"visit {self.website.port} {self.website.certs.other_ca}")

    def has(self, version: int) -> bool:
        """Is a libpq of this version in the process?"""
        return any(file.endswith(f".so.5.{version}") for file in self.told("mapped").split())


@pytest.fixture
def python(monitor, eavesdropper, website, tmp_path):
    def at_work(way=TLS, **more):
        return Python.at_work(way, eavesdropper.conninfo(sslmode=way.sslmode), tmp_path, monitor, eavesdropper, website, **more)
    return at_work


def asked(directory) -> set[str]:
    """The libpqs whose own PQgetCancel pqcancel has looked up so far: it does so before it asks one anything."""
    found = bindings.told(directory)
    return {name for name in THREE if bindings.asked_for_cancels(FILES[name], found)}


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_each_is_cancelled_through_its_own_libpq_in_any_order(eavesdropper, python, tmp_path, order):
    """The old functions in one order, and the new ones in the reverse (psycopg2 knows the old ones only). A cancel that
    hits its query is proof by itself: no other libpq could have read the session's key."""
    loader = tmp_path / "loader"
    with python(**bindings.told_to(loader)) as program:
        program.visits()
        for name in order:
            program.open(name)
        for name in order:
            assert FILES[name].fullmatch(program.told(f"readers {name}")), "one libpq, and its own, reads the session"
        expected = {"psycopg2"}  # which takes its PGcancel when it connects
        assert asked(loader) == expected
        program.query(*order)
        for name in order:
            program.cancel(name)
            expected.add(name)
            assert asked(loader) == expected
            program.visits()
        program.query(*order)
        for name in reversed(order):
            program.cancel(name, "cancel" if name == "psycopg2" else "cancel_safe")
        program.visits()
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=6)
    assert bindings.trespasses(bindings.told(loader)) == set()


def test_without_pqcancel(eavesdropper, python):
    """The control experiment: the same cancels are readable."""
    with python(WITHOUT) as program:
        for name in THREE:
            program.open(name)
        program.query(*THREE)
        for name in THREE:
            program.cancel(name)
    assert eavesdropper.cancels == Cancels(readable=3, encrypted=0)


# Unloading.

# What is opened, its libpq, and who else is there. A plugin is unloaded together with its libpq; Python's modules never are.
UNLOADED = {
    "drop-in": ("system", 15, ("psycopg", "psycopg2")),
    "plugin-of-the-system": ("plugin", 15, ("psycopg", "psycopg2")),
    "plugin-of-a-wheel": ("plugin", 17, ("psycopg", "system")),
}


@pytest.fixture(scope="module")
def plugins():
    """plugin.c with Debian's libpq, and with those of the wheels; by the libpq's version."""
    directory = BUILD / "plugin"
    directory.mkdir(parents=True, exist_ok=True)

    def build(version: int, *libraries):
        return programs.cc(directory / f"plugin-{version}.so", SOURCES / "plugin.c", "-shared", "-fPIC", *libraries,
                           "-Wl,--allow-shlib-undefined")

    def build_with(wheel: str):
        directory = peers.drivers() / f"{wheel}_binary.libs"
        return build(VERSIONS[wheel], next(directory.glob("libpq-*.so.5.*")), f"-Wl,-rpath,{directory}")

    return {15: build(15, *programs.pkg_config("--libs", "libpq")), 17: build_with("psycopg2"), 18: build_with("psycopg")}


@pytest.mark.parametrize("used", [False, True], ids=["not-used", "used"])
@pytest.mark.parametrize("unloaded", UNLOADED)
def test_one_is_unloaded_and_loaded_again(eavesdropper, python, plugins, unloaded, used):
    """A libpq that was asked for a cancel stays in the process, because nobody knows when it will be asked again. (One
    behind the drop-in may stay in any case.) Loaded again, by what name ever, it is cancelled as before."""
    name, version, remaining = UNLOADED[unloaded]
    words = f" {SYSTEM if name == 'system' else plugins[version]}"
    with python(dlopen=unloaded != "plugin-of-the-system") as program:
        program.open(name, words, version)
        for other in remaining:
            program.open(other)
        for each in [name, *remaining] if used else []:
            program.cancel_alone(each)
        assert program.has(version)
        program.does(f"close {name}", "closed")
        program.does(f"unload {name}", "unloaded")
        assert program.has(version) == used or name == "system"
        program.visits()
        program.query(*remaining)
        for other in remaining:
            program.cancel(other)
        program.open(name, words, version)
        for verb in ("cancel", "cancel_safe"):
            program.query(name, *remaining)
            for each in (*remaining, name):
                program.cancel(each, "cancel" if each == "psycopg2" else verb)
        program.visits()
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=(3 if used else 0) + 2 + 6)


def test_another_caller_at_the_place_of_one_that_is_gone(eavesdropper, python, plugins):
    """Who called, and from which libpq, is remembered by the address: that must end with the caller."""
    with python() as program:
        places = []
        for version in (17, 18, 17):
            program.open("plugin", f" {plugins[version]}", version)
            places.append(program.told("place plugin"))
            program.cancel_alone("plugin")
            program.cancel_alone("plugin", "cancel_safe")
            program.does("close plugin", "closed")
            program.does("unload plugin", "unloaded")
        assert len(set(places)) == 1, places
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=6)


# Where nothing tells which libpq is meant, or something else than the caller's dependencies does.

def test_a_caller_that_may_mean_any_of_them(monitor, eavesdropper, python):
    """Python's ctypes with CDLL(None), which finds what is preloaded: who calls then is libffi. Nothing is sent; and those
    who can be told apart are cancelled as ever."""
    with python(dlopen=False) as program:
        for name, words in (("psycopg2", None), ("psycopg", None), ("system", f" {SYSTEM} process")):
            program.open(name, words)
        program.query(*THREE)
        connections = len(eavesdropper.connections)
        program.does("cancel system", f"PQcancel() -- {AMBIGUOUS}")
        program.does("cancel_safe system", AMBIGUOUS)
        program.does("request_cancel system", "not delivered")
        program.sleeping(3)
        assert len(eavesdropper.connections) == connections
        for name in ("psycopg2", "psycopg"):
            program.cancel(name)
        monitor.cancel(eavesdropper.name)
        program.does("end system", "57014, 42")
        program.visits()
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=2)


@pytest.mark.parametrize("verb", ["cancel", "cancel_safe", "request_cancel"])
def test_a_caller_that_may_mean_only_one(eavesdropper, python, verb):
    with python(dlopen=False) as program:
        program.open("system", f" {SYSTEM} process")
        program.cancel_alone("system", verb)
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=1)


@pytest.mark.parametrize("order", [("global", "psycopg2", "psycopg"), ("psycopg2", "psycopg", "global")], ids="-".join)
def test_a_libpq_in_the_global_scope(eavesdropper, python, order):
    """There it comes before the ones that modules bring along, for modules that are loaded after it (so it is in programs
    that are linked with libpq and embed Python): those modules use it, and not their own."""
    first = order[0] == "global"
    with python(dlopen=False) as program:
        for name in order:
            version = 15 if first or name == "global" else VERSIONS[name]
            program.open(name, f" {SYSTEM} process" if name == "global" else "", version)
        program.query(*order)
        for name in order:
            program.cancel(name)
        program.visits()
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=3)


@pytest.mark.parametrize("major", [17, 18])
def test_a_newer_libpqs_own_functions(eavesdropper, python, major):
    """Looked up in its handle they are not ours, and go on as before, though they call each other by names that are."""
    libraries = peers.postgres(major) / "lib"
    with python(dlopen=False, LD_LIBRARY_PATH=str(libraries)) as program:
        program.open("system", version=major)
        program.cancel_alone("system", "cancel_safe")
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=1)
