"""Programs that nobody rebuilds, started with the library preloaded; and without it, which is the control experiment.

PQCANCEL_WRAPPER names the wrapper that is installed as `pqcancel`, PQCANCEL_DROPIN the directory of the drop-in.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

import peers
from eavesdropper import Cancels
from library import LIBRARY

WRAPPER = Path(os.environ.get("PQCANCEL_WRAPPER", LIBRARY.parent / "pqcancel")).absolute()
DROPIN = Path(os.environ.get("PQCANCEL_DROPIN", LIBRARY.parent / "dlopen")).absolute()
BIN = peers.postgres_system() / "bin"  # the programs themselves: what is in /usr/bin is a Perl script that finds them


@dataclass(frozen=True)
class Way:
    """How a program runs, and by that whether its cancels can be read on the wire."""

    sslmode: str
    preloaded: bool
    readable: bool

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        preload = {"LD_PRELOAD": str(LIBRARY)} if self.preloaded else {}
        return {"HOME": str(home), "LC_ALL": "C", "PATH": os.defpath, **preload, **more}

    def shows(self, cancels: int) -> Cancels:
        """What an eavesdropper sees of so many."""
        return Cancels(readable=cancels, encrypted=0) if self.readable else Cancels(readable=0, encrypted=cancels)


TLS = Way("verify-full", preloaded=True, readable=False)
PLAINTEXT = Way("disable", preloaded=True, readable=True)
WITHOUT = Way("verify-full", preloaded=False, readable=True)

each_way = pytest.mark.parametrize("way", [TLS, PLAINTEXT, WITHOUT], ids=["tls", "plaintext", "tls-without-pqcancel"])
