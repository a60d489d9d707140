"""An eavesdropper: a TCP proxy that passes every byte on, changes nothing, and keeps a copy with the time it came.

What can be read in the copy is the business of decode.py.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass, field

CLIENT, SERVER = "client", "server"


@dataclass(frozen=True)
class Chunk:
    """What one recv() returned; no bytes mean that the sender closed its side."""

    time: float  # seconds since the client connected
    sender: str
    data: bytes


@dataclass
class Connection:
    """One recorded connection. `chunks` is complete once `closed` is set."""

    opened: float = field(default_factory=time.monotonic)
    chunks: list[Chunk] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)

    def record(self, sender: str, data: bytes) -> None:
        self.chunks.append(Chunk(time.monotonic() - self.opened, sender, data))

    def sent_by(self, sender: str) -> bytes:
        return b"".join(chunk.data for chunk in self.chunks if chunk.sender == sender)

    def round_trips(self) -> int:
        """How often the client waited for the server: to connect and then, until it closed, for each answer."""
        ends = (at for at, chunk in enumerate(self.chunks) if chunk.sender == CLIENT and not chunk.data)
        turns = [chunk.sender for chunk in self.chunks[:next(ends, len(self.chunks))]]
        return 1 + sum(pair == (CLIENT, SERVER) for pair in zip(turns, turns[1:]))


class Eavesdropper:
    """Listens on a free port of 127.0.0.1 and forwards to a server, for use in a `with` statement."""

    host = "127.0.0.1"

    def __init__(self, server: tuple[str, int]):
        self.server = server
        self.connections: list[Connection] = []
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Eavesdropper":
        self._listener = socket.create_server((self.host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._spawn(self._accept)
        return self

    def __exit__(self, *_exception) -> None:
        # shutdown(), unlike close(), wakes the threads that wait in accept() and recv().
        for sock in [self._listener, *self._sockets]:
            _shut(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def take(self, seconds: float) -> list[Connection]:
        """The connections since the last call, each recorded to its end, for which this waits at most so long."""
        taken, self.connections = self.connections, []
        deadline = time.monotonic() + seconds
        for connection in taken:
            if not connection.closed.wait(max(0.0, deadline - time.monotonic())):
                raise TimeoutError("a recorded connection is still open")
        return taken

    def _spawn(self, target, *arguments) -> threading.Thread:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # the listener was shut
                return
            connection = Connection()
            self.connections.append(connection)
            self._spawn(self._forward, client, connection)

    def _forward(self, client: socket.socket, connection: Connection) -> None:
        with client:
            try:
                server = socket.create_connection(self.server)
            except OSError:
                connection.closed.set()
                return
            with server:
                pair = {client, server}
                self._sockets |= pair
                for sock in pair:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                answers = self._spawn(_pump, server, client, SERVER, connection)
                _pump(client, server, CLIENT, connection)
                answers.join()
                self._sockets -= pair
        connection.closed.set()


def _pump(source: socket.socket, target: socket.socket, sender: str, connection: Connection) -> None:
    """Passes on what source sends until it closes, then closes that direction towards target as well."""
    data = b"?"
    while data:
        try:
            data = source.recv(65536)
        except OSError:  # reset
            data = b""
        connection.record(sender, data)
        try:
            target.sendall(data)
        except OSError:  # target is gone; what source still says has no reader
            break
    _shut(target, socket.SHUT_WR)


def _shut(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError:  # not connected any more
        pass
