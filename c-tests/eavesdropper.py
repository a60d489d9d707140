"""Who listens between programs and a real server: records any number of connections, and finds the cancels among them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

import wire
from certs import Certs
from hostile import CancelConnection, Proxy, Run, Script
from server import Postgres
from wire import SEALED_CANCEL_REQUESTS, TLS13_OVERHEAD

# Sizes of what a client without a certificate sends to open and to close TLS 1.3: around a CancelRequest nothing else.
EMPTY_CERTIFICATE, FINISHED_SHA256, FINISHED_SHA384, CLOSE_NOTIFY = (size + TLS13_OVERHEAD for size in (8, 36, 52, 2))
FRAME = (EMPTY_CERTIFICATE, FINISHED_SHA256, FINISHED_SHA384, CLOSE_NOTIFY)


class Cancels(NamedTuple):
    """How many came by."""

    readable: int
    encrypted: int


class Eavesdropper:
    """Listens on a free port of 127.0.0.1, for use in a `with` statement. Passes all connections through and records them.

    With a script (see scripts.py) only the first one is passed through: the session. Those after it are recorded, and
    answered by the script.
    """

    def __init__(self, server: Postgres, certs: Certs, script: Script | None = None):
        self.server, self.certs, self.script = server, certs, script

    def __enter__(self) -> "Eavesdropper":
        with ExitStack() as stack:
            proxy = stack.enter_context(Proxy(self.server, "tcp4"))
            self.run = stack.enter_context(Run(proxy, self.script or CancelConnection.pass_through,
                                               sessions=1 if self.script else 0))
            self.stack = stack.pop_all()
        self.name = f"overheard-at-{proxy.port}"  # the application_name of all who come this way
        self.place = {"host": "localhost", "hostaddr": proxy.host, "port": proxy.port, "sslrootcert": self.certs.ca}
        return self

    def __exit__(self, *exception) -> None:
        self.stack.__exit__(*exception)

    def conninfo(self, **options) -> str:
        """The way through here to the server, by default as safe as a session can be."""
        return self.server.conninfo(**{**self.place, "application_name": self.name, "sslmode": "verify-full", **options})

    @property
    def connections(self) -> list[CancelConnection]:
        """All that were recorded, in the order in which they came."""
        return list(self.run.cancels)

    @property
    def received(self) -> int:
        """Bytes from the server."""
        return sum(len(connection.sent_by_server) for connection in self.connections)

    @property
    def readable(self) -> list[CancelConnection]:
        """Those that showed a CancelRequest in the clear."""
        return [connection for connection in self.connections if wire.is_readable(connection)]

    @property
    def cancels(self) -> Cancels:
        return Cancels(len(self.readable), sum(map(_is_encrypted_cancel, self.connections)))


def _is_encrypted_cancel(connection: CancelConnection) -> bool:
    """Told by its size, and by being all that was said. A session says more: its StartupMessage names who it is."""
    said = [size for size in wire.read(connection)[1] if size not in FRAME]
    return len(said) == 1 and said[0] in SEALED_CANCEL_REQUESTS
