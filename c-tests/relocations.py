"""Packed relocations (DT_RELR) of a shared library for 64 bits: which words are addresses, read from the file itself."""

from __future__ import annotations

import struct
from pathlib import Path

PT_LOAD, PT_DYNAMIC = 1, 2
DT_RELRSZ, DT_RELR = 35, 36
WORD = struct.Struct("<Q")
SEGMENT = struct.Struct("<IIQQQQQQ")  # type, flags, offset, address, physical address, size in the file, in memory, alignment
SLOTS = 63  # that one bitmap tells of


def packed_relocations(library: Path) -> dict[int, int]:
    """Where the loader adds the address of the library, and to what. Empty where relocations are not packed."""
    file = library.read_bytes()
    (start,), (size, count) = WORD.unpack_from(file, 32), struct.unpack_from("<HH", file, 54)
    segments = [SEGMENT.unpack_from(file, start + number * size) for number in range(count)]

    def word(address: int) -> int:
        for kind, _, offset, begin, _, length, *_ in segments:
            if kind == PT_LOAD and begin <= address < begin + length:
                return WORD.unpack_from(file, offset + address - begin)[0]
        raise ValueError(f"{address:#x} is not in the file")

    dynamic = next(segment for segment in segments if segment[0] == PT_DYNAMIC)
    tags = dict(struct.iter_unpack("<QQ", file[dynamic[2]:dynamic[2] + dynamic[5]]))
    table = tags.get(DT_RELR, 0)
    entries = (word(table + offset) for offset in range(0, tags.get(DT_RELRSZ, 0), WORD.size))
    return {slot: word(slot) for slot in _slots(entries)}


def _slots(entries):
    """An even entry is a slot; an odd one says which of the next 63 are, too."""
    following = 0
    for entry in entries:
        if entry % 2 == 0:
            yield entry
            following = entry + WORD.size
        else:
            yield from (following + bit * WORD.size for bit in range(SLOTS) if entry >> (bit + 1) & 1)
            following += SLOTS * WORD.size
