"""A proxy that makes the way to a server long: it holds every byte back for a while, in both directions, in order.

It also tells how often the conversation turned: each turn to the server is a round trip that the client had to wait for.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from dataclasses import dataclass, field

from eavesdropper import CLOSE_NOTIFY
from hostile import Recording
from wire import RECORD_HEADER


@dataclass
class Conversation(Recording):
    """One connection, as it looked half-way."""

    wire: list[tuple[str, bytes]] = field(default_factory=list)  # (">" or "<", bytes); no bytes: closed
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, direction: str, data: bytes) -> None:
        with self.lock:
            self.wire.append((direction, data))

    @property
    def turns(self) -> int:
        """Changes of direction towards the server, the beginning included, that the server answered: by data or by closing.
        (But to a client's close_notify nobody waits for an answer, even if the server has yet to close.)"""
        directions = [direction for direction, data in self.wire
                      if direction == "<" or len(data) not in (0, RECORD_HEADER + CLOSE_NOTIFY)]
        answered = directions[:len(directions) - directions[::-1].index("<")] if "<" in directions else []
        return sum(direction == ">" and (i == 0 or answered[i - 1] == "<") for i, direction in enumerate(answered))

    @property
    def round_trips(self) -> int:
        """The TCP handshake is one more. After the last turn the client waits for the server to close."""
        return 1 + self.turns


class DelayingProxy:
    """Listens on a free port of 127.0.0.1, for use in a `with` statement."""

    host = "127.0.0.1"

    def __init__(self, port: int, delay: float):
        self.upstream_port, self.delay = port, delay
        self.conversations: list[Conversation] = []
        self.threads: list[threading.Thread] = []
        self.open: list[socket.socket] = []

    def __enter__(self) -> "DelayingProxy":
        self.listener = socket.create_server((self.host, 0))
        self.port = self.listener.getsockname()[1]
        self._spawn(self._accept)
        return self

    def __exit__(self, *_exception) -> None:
        for sock in [self.listener, *self.open]:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed by its peer already
                pass
        for thread in self.threads:
            thread.join(60)
        for sock in [self.listener, *self.open]:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # the end
                return
            upstream = socket.create_connection((self.host, self.upstream_port))
            for sock in (client, upstream):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.open += [client, upstream]
            conversation = Conversation()
            self.conversations.append(conversation)
            self._forward(client, upstream, conversation, ">")
            self._forward(upstream, client, conversation, "<")

    def _forward(self, source: socket.socket, target: socket.socket, conversation: Conversation, direction: str) -> None:
        """One thread takes bytes in and dates them, the other lets them out when it is time."""
        waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

        def take() -> None:
            data = b"?"
            while data:
                try:
                    data = source.recv(65536)
                except OSError:
                    data = b""
                waiting.put((time.monotonic() + self.delay, data))

        def release() -> None:
            data = b"?"
            while data:
                due, data = waiting.get()
                time.sleep(max(0.0, due - time.monotonic()))  # the delay that this proxy is for
                conversation.note(direction, data)
                try:
                    target.sendall(data) if data else target.shutdown(socket.SHUT_WR)
                except OSError:  # the other side is gone
                    return

        self._spawn(take)
        self._spawn(release)

    def _spawn(self, target) -> None:
        thread = threading.Thread(target=target, daemon=True)
        self.threads.append(thread)
        thread.start()
