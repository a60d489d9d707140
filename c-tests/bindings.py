"""Whose function answers to a name: what the dynamic loader tells of every symbol that it binds (LD_DEBUG=bindings)."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

from test_library import EXPORTS, readelf

OURS = re.compile(r"libpqcancel\.so")
LINE = re.compile(r"^\s*\d+:\tbinding file (\S+) \[\d+\] to (\S+) \[\d+\]: \w+ symbol `(\S+)'(?: \[(\S+)\])?$", re.MULTILINE)
# Of libc, its loader and libgcc. A program may hold their variables and the addresses of their functions for all.
SYSTEM_VERSION = re.compile(r"(GLIBC|GCC)_")


class Binding(NamedTuple):
    """`name` as `user` has it is what `owner` exports; both by their file names, without directories."""

    user: str
    owner: str
    name: str
    version: str


def told_to(directory: Path) -> dict[str, str]:
    """An environment in which programs bind all symbols at once, and the loader tells of them in this directory."""
    directory.mkdir(exist_ok=True)
    return {"LD_BIND_NOW": "1", "LD_DEBUG": "bindings", "LD_DEBUG_OUTPUT": str(directory / "bindings")}


def told(directory: Path) -> set[Binding]:
    """What the programs had bound so far, also those that still run."""
    text = "".join(path.read_text() for path in directory.glob("bindings.*"))
    return {Binding(Path(user).name, Path(owner).name, name, version) for user, owner, name, version in LINE.findall(text)}


@functools.cache
def needed() -> set[str]:
    """The libraries that the library under test is linked with."""
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("--dynamic")))


def trespasses(found: set[Binding]) -> set[Binding]:
    """Others' symbols that are bound to the library under test, beside what it is there for; and its own that are bound to
    what it does not need."""
    return {binding for binding in found
            if (OURS.match(binding.owner) and binding.name not in EXPORTS)
            or (OURS.match(binding.user) and not OURS.match(binding.owner) and binding.owner not in needed()
                and not SYSTEM_VERSION.match(binding.version))}


def asked_for_cancels(library: re.Pattern, found: set[Binding]) -> bool:
    """Was a PQgetCancel looked for in this very library? Only pqcancel does: whoever else looks, finds pqcancel's first."""
    return any(library.fullmatch(b.user) and library.fullmatch(b.owner) for b in found if b.name == "PQgetCancel")
