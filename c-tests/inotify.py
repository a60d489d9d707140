"""Whether files were opened meanwhile: Linux's inotify(7)."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

IN_OPEN = 0x20
EVENT = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Counts how often files are opened, for use in a `with` statement."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __enter__(self) -> "Watch":
        self.descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        for path in self.files:
            if _libc.inotify_add_watch(self.descriptor, os.fsencode(path), IN_OPEN) < 0:
                raise OSError(ctypes.get_errno(), "inotify_add_watch", str(path))
        return self

    def __exit__(self, *_exception) -> None:
        os.close(self.descriptor)

    def opened(self) -> int:
        """How often since the last call."""
        try:
            events = os.read(self.descriptor, 65536)
        except BlockingIOError:
            return 0
        count = offset = 0
        while offset < len(events):
            offset += EVENT.size + EVENT.unpack_from(events, offset)[3]
            count += 1
        return count
