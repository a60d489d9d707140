"""A server of our own that hands out cancel keys as no real one does, and takes note of every CancelRequest that it gets.

What key a session gets, its database says: "17" is a key of 17 bytes, "17 of 0" one for the backend PID 0, and "none" is a
server that sends no BackendKeyData. A session whose query is such a text gets another key, and another PID with it.
"""

from __future__ import annotations

import hashlib
import itertools
import socket
import ssl
import struct
import threading
from contextlib import suppress
from typing import NamedTuple

from hostile import DEADLINE, SSL_REQUEST
from wire import CANCEL_REQUEST_CODE, GSSENC_REQUEST

AUTHENTICATION_OK = (0).to_bytes(4, "big")
IDLE = b"I"


class Request(NamedTuple):
    """A CancelRequest."""

    packet: bytes
    encrypted: bool


class KeyServer:
    """Listens on a free port of 127.0.0.1, for use in a `with` statement."""

    host = "127.0.0.1"

    def __init__(self, context: ssl.SSLContext):
        self.context = context
        self.pids = itertools.count(1)
        self.handed_out: list[bytes] = []  # the CancelRequest for each key that was handed out
        self.requests: list[Request] = []  # what came
        self.errors: list[BaseException] = []
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> "KeyServer":
        self.listener = socket.create_server((self.host, 0), backlog=16)
        self.port = self.listener.getsockname()[1]
        self.accepter = threading.Thread(target=self._accept)
        self.accepter.start()
        return self

    def __exit__(self, *exception) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        for thread in [self.accepter, *self.threads]:
            thread.join()
        self.listener.close()
        if self.errors and not exception[0]:
            raise self.errors[0]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:  # shut down
                return
            sock.settimeout(DEADLINE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._serve, args=(sock,))
            self.threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            self._converse(sock)
        except (EOFError, ConnectionError):
            pass  # a client may go at any time
        except BaseException as error:
            self.errors.append(error)
        finally:
            sock.close()

    def _converse(self, sock: socket.socket) -> None:
        packet = _receive_packet(sock)
        if packet == GSSENC_REQUEST:
            sock.sendall(b"N")
            packet = _receive_packet(sock)
        if packet == SSL_REQUEST:
            sock.sendall(b"S")
            sock = self.context.wrap_socket(sock, server_side=True)
            packet = _receive_packet(sock)
        encrypted = isinstance(sock, ssl.SSLSocket)
        if packet[4:8] == CANCEL_REQUEST_CODE:
            self.requests.append(Request(packet, encrypted))
        else:
            self._session(sock, packet)
        if encrypted:
            with suppress(OSError):  # the client may not wait for close_notify
                sock.unwrap()
        sock.close()

    def _session(self, sock: socket.socket, startup: bytes) -> None:
        options = startup[8:].rstrip(b"\0").split(b"\0")
        database = options[options.index(b"database") + 1].decode()
        _send(sock, b"R", AUTHENTICATION_OK)
        _send(sock, b"S", b"server_version\x0018.0\0")
        self._hand_out(sock, database)
        _send(sock, b"Z", IDLE)
        while (kind := _receive(sock, 1)) == b"Q":
            query = _receive_packet(sock)[4:].rstrip(b"\0").decode()
            self._hand_out(sock, query)
            _send(sock, b"I")
            _send(sock, b"Z", IDLE)
        if kind != b"X":
            raise RuntimeError(f"expected a query or the end, got {kind!r}")

    def _hand_out(self, sock: socket.socket, what: str) -> None:
        if what == "none":
            return
        length, _, pid = what.partition(" of ")
        # Every other PID is negative to who takes it for an int: some servers send any 32 bits.
        number = next(self.pids)
        head = struct.pack("!I", int(pid) if pid else number if number % 2 else 2 ** 32 - number)
        key = hashlib.shake_256(number.to_bytes(4, "big")).digest(int(length))
        # Noted before it is sent: who refuses the key opens the next session before this thread need go on.
        self.handed_out.append(struct.pack("!I", 12 + len(key)) + CANCEL_REQUEST_CODE + head + key)
        _send(sock, b"K", head + key)


def _send(sock: socket.socket, kind: bytes, body: bytes = b"") -> None:
    sock.sendall(kind + struct.pack("!I", 4 + len(body)) + body)


def _receive_packet(sock: socket.socket) -> bytes:
    """A length that includes itself, then the rest."""
    head = _receive(sock, 4)
    return head + _receive(sock, struct.unpack("!I", head)[0] - 4)


def _receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data
