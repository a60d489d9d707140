"""Whose function answers to a name: what the dynamic loader tells of every symbol that it binds (LD_DEBUG=bindings)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from test_library import EXPORTS, MAY_NEED

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


def bound_to(library: re.Pattern, found: set[Binding]) -> set[str]:
    """The names for which others, or it itself, came to this library."""
    return {binding.name for binding in found if library.match(binding.owner)}


def leaves_the_others_alone(found: set[Binding]) -> None:
    """Nobody's symbol is bound to the library under test but what it is there for, and none of its own to a stranger."""
    assert bound_to(OURS, found) <= set(EXPORTS)
    strangers = {binding for binding in found if OURS.match(binding.user) and not OURS.match(binding.owner)
                 and binding.owner not in MAY_NEED and not SYSTEM_VERSION.match(binding.version)}
    assert strangers == set()


def asked_for_cancels(library: re.Pattern, found: set[Binding]) -> bool:
    """Was a PQgetCancel looked for in this very library? Only pqcancel does: whoever else looks, finds pqcancel's first."""
    return any(library.match(b.user) and library.match(b.owner) for b in found if b.name == "PQgetCancel")
