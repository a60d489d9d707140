"""What a function of the library can reach, read from its machine code (x86-64): binutils' objdump, readelf and c++filt.

Followed are direct calls and jumps, calls through the global offset table, and functions whose address is taken. A call
through a register counts as one through the table if the register was loaded from there; a jump through a register with a
computed offset is a switch.
"""

from __future__ import annotations

import re
import subprocess
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from relocations import packed_relocations

LABEL = re.compile(r"^([0-9a-f]+) <(.*)>:$")
INSTRUCTION = re.compile(r"^ *[0-9a-f]+:\t(?:(?:bnd|notrack|rep|repz|lock|data16) )*(\S+) *([^#]*?) *(?:# ([0-9a-f]+) <.*)?$")
ADDRESS = re.compile(r"^([0-9a-f]+) <")
BRANCH = re.compile(r"^(call|j[a-z]+)$")
RELOCATION = re.compile(r"^([0-9a-f]+)  [0-9a-f]+ R_X86_64_(RELATIVE|GLOB_DAT|JUMP_SLOT) +(\S+)(?: (\S+))?", re.MULTILINE)
HASH = re.compile(r"::h[0-9a-f]{16}$|\[[0-9a-f]{16}\]")  # of a function, of a crate


@dataclass
class Reach:
    """What can be reached. Functions by name, with the one that leads there, for the way."""

    local: dict[str, str] = field(default_factory=dict)
    imported: dict[str, str] = field(default_factory=dict)
    indirect: set[str] = field(default_factory=set)  # functions that call through a pointer from elsewhere

    def way(self, name: str) -> str:
        """How it is reached, backwards."""
        steps = [name]
        while (before := self.imported.get(steps[-1]) or self.local.get(steps[-1])) and before not in steps:
            steps.append(before)
        return " <- ".join(steps)


class Code:
    def __init__(self, library: Path):
        self.library = library

    @cached_property
    def functions(self) -> dict[int, tuple[str, list[str]]]:
        """By address: name and instructions."""
        found: dict[int, tuple[str, list[str]]] = {}
        lines: list[str] = []
        for line in self._run("objdump", "--disassemble", "--no-show-raw-insn").splitlines():
            if label := LABEL.match(line):
                lines = []
                found[int(label[1], 16)] = (label[2], lines)
            elif ":\t" in line:
                lines.append(line)
        # What stands beside the instructions is left mangled: so it holds no blanks and no # of its own.
        mangled = "\n".join(name for name, _ in found.values())
        names = subprocess.run(["c++filt"], input=mangled, check=True, capture_output=True, text=True).stdout.splitlines()
        return {address: (HASH.sub("", name), lines) for (address, (_, lines)), name in zip(found.items(), names, strict=True)}

    @cached_property
    def starts(self) -> list[int]:
        return sorted(self.functions)

    @cached_property
    def table(self) -> dict[int, int | str]:
        """What the slots of the global offset table hold once the library is loaded: a function of the library or a name."""
        slots: dict[int, int | str] = {}
        for slot, kind, first, second in RELOCATION.findall(self._run("readelf", "--relocs", "--wide")):
            if kind != "RELATIVE":
                slots[int(slot, 16)] = second.split("@")[0]
            elif int(first, 16) in self.functions:
                slots[int(slot, 16)] = int(first, 16)
        packed = packed_relocations(self.library).items()
        return slots | {slot: address for slot, address in packed if address in self.functions}

    def reach(self, name: str) -> Reach:
        reach = Reach(local={name: ""})
        todo = [next(address for address, (found, _) in self.functions.items() if found == name)]
        seen = set(todo)
        while todo:
            address = todo.pop()
            here = self.functions[address][0]
            for target in self._references(address, reach):
                if isinstance(target, str):
                    reach.imported.setdefault(target, here)
                elif target not in seen:
                    seen.add(target)
                    todo.append(target)
                    reach.local.setdefault(self.functions[target][0], here)
        return reach

    def _references(self, address: int, reach: Reach) -> set[int | str]:
        """Functions, by address or name, that this one calls, jumps to, or mentions."""
        name, lines = self.functions[address]
        if name.endswith("@plt"):
            return {name.removesuffix("@plt")}
        found: set[int | str] = set()
        held: dict[str, str] = {}  # what registers were given last: a function of the table, or the offset of a switch
        for line in lines:
            mnemonic, operands, memory = INSTRUCTION.match(line).groups()
            target = int(memory, 16) if memory else None
            last = operands.split(",")[-1]
            if target in self.table or target in self.functions:
                found.add(self.table.get(target, target))
            elif BRANCH.match(mnemonic) and (direct := ADDRESS.match(operands)):
                found.add(self.starts[bisect_right(self.starts, int(direct[1], 16)) - 1])
            elif BRANCH.match(mnemonic) and held.get(last.removeprefix("*")) not in ("function", f"offset of {mnemonic}"):
                reach.indirect.add(name)
            if mnemonic == "mov":
                held[last] = "function" if target in self.table else held.get(operands.removesuffix(f",{last}"), "")
            else:
                held[last] = "offset of jmp" if mnemonic == "add" else ""
        return found

    def _run(self, *command: str) -> str:
        return subprocess.run([*command, self.library], check=True, capture_output=True, text=True).stdout
