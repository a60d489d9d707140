"""A proxy between the driver and a real server, in which cancel connections meet a script.

The first connection of a run (or the first few) is the session: it is passed through byte by byte, so that it is a
genuine PostgreSQL session. Every later one is a cancel connection. It is passed through too, or a script plays the
server's part: see scripts.py. All bytes of the cancel connections are recorded as they were on the wire.

Nothing here waits for time to pass: scripts act on what arrives, or step by step with the driver over the control
socket (gates), and tell the driver when nothing will happen any more.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import sys
import tempfile
import threading
from pathlib import Path
from typing import Callable

from monitor import wait_until
from server import Postgres, reserved_port

DEADLINE = 60  # seconds; no script may wait longer
SSL_REQUEST = struct.pack("!II", 8, 80877103)


class Recording:
    """What went over the wire: (">" from the client or "<" to it, bytes), in order."""

    wire: list[tuple[str, bytes]]

    @property
    def sent_by_client(self) -> bytes:
        return b"".join(data for direction, data in self.wire if direction == ">")

    @property
    def sent_by_server(self) -> bytes:
        return b"".join(data for direction, data in self.wire if direction == "<")


class CancelConnection(Recording):
    """One cancel connection, as its script sees it. A client that goes away ends the script with EOFError."""

    def __init__(self, run: "Run", sock: socket.socket, number: int):
        self.run, self.sock, self.number = run, sock, number
        self.wire = []
        self.peer_certificate: bytes | None = None  # what the client showed in TLS, DER

    def receive_some(self, size: int = 65536) -> bytes:
        """What has arrived, at least one byte."""
        data = self.sock.recv(size)
        if not data:
            raise EOFError
        self.wire.append((">", data))
        return data

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self.receive_some(size - len(data))
        return data

    def receive_packet(self) -> bytes:
        """An SSLRequest or a CancelRequest: a length that includes itself, then the rest."""
        head = self.receive(4)
        return head + self.receive(struct.unpack("!I", head)[0] - 4)

    def receive_record(self) -> bytes:
        """A TLS record, such as a ClientHello."""
        head = self.receive(5)
        return head + self.receive(struct.unpack("!H", head[3:])[0])

    def send(self, data: bytes) -> None:
        self.wire.append(("<", data))
        self.sock.sendall(data)

    def wait_until_taken(self) -> None:
        """Until the client has read all that was sent to it: with the next that is sent, it must read again."""
        wait_until(lambda: _unread_at(self.sock.getpeername()) == 0)

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Ends the connection with RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def hold(self) -> None:
        """Says nothing more, and reads until the client goes away."""
        self.run.tell_driver(b"s")
        while True:
            self.receive_some()

    def pass_through(self) -> None:
        """Lets the real server answer."""
        with self.run.proxy.connect_upstream() as upstream:
            _relay(self.sock, upstream, self.wire)


class TlsServer:
    """The server's side of TLS over a CancelConnection, under the script's control record by record."""

    def __init__(self, connection: CancelConnection, context: ssl.SSLContext):
        self.connection = connection
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)

    def first_flight(self) -> bytes:
        """Reads the ClientHello; returns, and does not send, what the server answers."""
        self.incoming.write(self.connection.receive_record())
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            pass
        return self.outgoing.read()

    def handshake(self) -> None:
        self._until_done(self.tls.do_handshake)
        self.connection.peer_certificate = self.tls.getpeercert(binary_form=True)

    def read(self, size: int) -> bytes:
        data = self._until_done(lambda: self.tls.read(size))
        if not data:
            raise EOFError
        return data

    def write(self, data: bytes) -> None:
        self.tls.write(data)
        self.connection.send(self.outgoing.read())

    def close_notify(self) -> None:
        try:
            self.tls.unwrap()
        except ssl.SSLWantReadError:  # ours is written; the client's is not waited for
            pass
        self.connection.send(self.outgoing.read())

    def _until_done(self, step: Callable):
        while True:
            try:
                return step()
            except ssl.SSLWantReadError:
                self._flush()
                self.incoming.write(self.connection.receive_some())
            finally:
                self._flush()

    def _flush(self) -> None:
        if self.outgoing.pending:
            self.connection.send(self.outgoing.read())


Script = Callable[[CancelConnection], None]


class Proxy:
    """Listens at one place for as long as the tests last, so that messages name the same place in every run.

    transport: tcp4, tcp6, unix or abstract.
    """

    def __init__(self, server: Postgres, transport: str):
        self.server, self.transport = server, transport

    def __enter__(self) -> "Proxy":
        self.directory = tempfile.TemporaryDirectory(prefix="pqcancel-proxy-")
        os.chmod(self.directory.name, 0o755)
        if self.transport in ("tcp4", "tcp6"):
            family, self.host = (socket.AF_INET, "127.0.0.1") if self.transport == "tcp4" else (socket.AF_INET6, "::1")
            self.listener = socket.socket(family)
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # The port is named in bind(), because one that the kernel chose is lost when the listener shuts down.
            with reserved_port([self.host]) as self.port:
                self.listener.bind((self.host, self.port))
        else:
            self.port = self.server.port
            self.host = self.directory.name if self.transport == "unix" else f"@{Path(self.directory.name).name}"
            self.path = f"{self.host}/.s.PGSQL.{self.port}"
            self.listener = socket.socket(socket.AF_UNIX)
        return self

    def __exit__(self, *_exception) -> None:
        self.listener.close()
        self.directory.cleanup()

    def listen(self) -> socket.socket:
        """TCP keeps its listener, and with it the port. A Unix socket is made anew: shut down, it stays so."""
        if self.transport not in ("tcp4", "tcp6"):
            self.listener.close()
            Path(self.path).unlink(missing_ok=True)
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind("\0" + self.path[1:] if self.transport == "abstract" else self.path)
        self.listener.listen(128)
        self.listening = True
        return self.listener

    def refuse(self) -> None:
        """From now on nobody listens, and who waits to be accepted is turned away."""
        if self.listening:  # a second shutdown would last: connections accepted later would inherit it
            self.listener.shutdown(socket.SHUT_RD)
        self.listening = False

    def connect_upstream(self) -> socket.socket:
        if self.transport in ("tcp4", "tcp6"):
            return _set_up(socket.create_connection((self.host, self.server.port)))
        upstream = _set_up(socket.socket(socket.AF_UNIX))
        upstream.connect(f"{self.server.socket_dir}/.s.PGSQL.{self.server.port}")
        return upstream


class Run:
    """One run of the driver against a Proxy, in a `with` statement: starts with a fresh record, ends with every thread
    joined and every socket closed. An error in a script is raised at the end."""

    def __init__(self, proxy: Proxy, script: Script = CancelConnection.pass_through, sessions: int = 1,
                 between: Callable[["Run"], bool] | None = None):
        """between(run) is called when the last session has been accepted, before anything of it is answered. If it
        returns False, no further connection is accepted."""
        self.proxy, self.script, self.sessions, self.between = proxy, script, sessions, between
        self.cancels: list[CancelConnection] = []
        self.errors: list[BaseException] = []
        self.open: list[socket.socket] = []  # to be closed at the end
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> "Run":
        self.listener = self.proxy.listen()
        self.control, self.driver_control = socket.socketpair()
        self.control.settimeout(DEADLINE)
        self.gates = self.control.makefile("rb")
        self.stop_reader, self.stop_writer = os.pipe()
        self._spawn(self._accept)
        return self

    def __exit__(self, *exception) -> None:
        self.driver_control.close()
        os.close(self.stop_writer)
        for sock in self.open:
            _shut(sock)
        for thread in self.threads:
            thread.join(2 * DEADLINE)
        os.close(self.stop_reader)
        for sock in [*self.open, self.gates, self.control]:
            sock.close()
        self.proxy.refuse()
        if self.errors and not exception[0]:
            raise self.errors[0]

    def tell_driver(self, message: bytes) -> None:
        self.control.send(message)

    def at_gate(self, name: str, action: Callable[[], None]) -> None:
        """Waits until the driver stands at the gate, acts, and lets it go on."""
        line = self.gates.readline().decode().strip()
        if line != name:
            raise RuntimeError(f"the driver is at gate {line!r}, not at {name!r}")
        action()
        self.tell_driver(b"o")

    def _accept(self) -> None:
        accepted = 0
        while True:
            readable, _, _ = select.select([self.listener, self.stop_reader], [], [])
            if self.stop_reader in readable:
                return
            sock, _ = self.listener.accept()
            _set_up(sock)
            self.open.append(sock)
            accepted += 1
            if accepted > self.sessions:
                self.cancels.append(CancelConnection(self, sock, accepted - self.sessions))  # in the order in which they came
                self._spawn(self._serve, self.cancels[-1])
                continue
            go_on = accepted < self.sessions or self.between is None or self.between(self)
            self._spawn(self._pass_session, sock)
            if not go_on:
                return

    def _pass_session(self, sock: socket.socket) -> None:
        with self.proxy.connect_upstream() as upstream:
            self.open.append(upstream)
            _relay(sock, upstream, [])
        _shut(sock)

    def _serve(self, connection: CancelConnection) -> None:
        self.script(connection)
        connection.close()

    def _spawn(self, target: Callable, *arguments) -> None:
        def guarded() -> None:
            try:
                target(*arguments)
            except (EOFError, ConnectionError, ssl.SSLError):
                for argument in arguments:  # the client has gone or refuses TLS, which is no error here
                    _shut(getattr(argument, "sock", argument))
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        self.threads.append(thread)
        thread.start()


def _relay(client: socket.socket, upstream: socket.socket, wire: list[tuple[str, bytes]]) -> None:
    """Passes bytes both ways until either side closes."""
    routes = {client: (upstream, ">"), upstream: (client, "<")}
    while True:
        readable, _, _ = select.select(list(routes), [], [])
        for source in readable:
            target, direction = routes[source]
            data = source.recv(65536)
            if not data:
                return
            wire.append((direction, data))
            target.sendall(data)


def _unread_at(address: tuple[str, int]) -> int:
    """Bytes that wait in the kernel for the owner of this local IPv4 address."""
    place = f"{int.from_bytes(socket.inet_aton(address[0]), sys.byteorder):08X}:{address[1]:04X}"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(int(row[4].split(":")[1], 16) for row in rows if row[1] == place)


def _set_up(sock: socket.socket) -> socket.socket:
    sock.settimeout(DEADLINE)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as PostgreSQL does: else a proxy adds 40 ms here and there
    return sock


def _shut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # not connected any more, or closed already
        pass
