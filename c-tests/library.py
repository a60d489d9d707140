"""The library under test: PQCANCEL_LIB names it."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import peers

LIBRARY = Path(os.environ.get("PQCANCEL_LIB", peers.ROOT / "target" / "release" / "libpqcancel.so")).absolute()


@cache
def has_private_openssl() -> bool:
    """Not so if it was built with OPENSSL=system: then it shares the program's, with its locks and error queues."""
    needed = subprocess.run(["readelf", "--dynamic", LIBRARY], check=True, capture_output=True, text=True).stdout
    return "libssl.so" not in needed
