"""What a server may do to a cancel connection that is to be encrypted with GSSAPI: scripts for hostile.Run."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Callable

from gssapi import GssServer
from hostile import CancelConnection, Script
from scripts import Ending, close

Answer = Callable[[GssServer], None]


def send_fin(connection: CancelConnection) -> None:
    """Ends its side only, and goes on reading."""
    connection.sock.shutdown(socket.SHUT_WR)
    while True:
        connection.receive_some()


# Before the context.

def after_gssenc_request(ending: Ending, answer: bytes = b"") -> Script:
    """Reads the GSSENCRequest, perhaps answers, and ends."""
    def script(connection: CancelConnection) -> None:
        GssServer(connection).expect_request()
        if answer:
            connection.send(answer)
        ending(connection)
    return script


def refuse_but_serve(answer: bytes) -> Script:
    """Refuses GSSAPI encryption, and serves whatever comes then: on this connection, or on further ones."""
    def script(connection: CancelConnection) -> None:
        if connection.number == 1:
            GssServer(connection).expect_request()
            connection.send(answer)
        connection.pass_through()
    return script


def after_token(ending: Ending, answer: bytes = b"") -> Script:
    """Goes on until the client has shown its ticket, perhaps answers, and ends."""
    def script(connection: CancelConnection) -> None:
        server = GssServer(connection)
        server.expect_request()
        connection.send(b"G")
        server.answer_to_token()
        if answer:
            connection.send(answer)
        ending(connection)
    return script


def with_own_token(change: Callable[[bytes], bytes], ending: Ending, before: bytes = b"",
                   takes_request: bool = False) -> Script:
    """The token that the client waits for, but changed; before: what was sent together with 'G'."""
    def script(connection: CancelConnection) -> None:
        server = GssServer(connection)
        server.expect_request()
        connection.send(b"G" + before)
        connection.send(change(server.answer_to_token()))
        if takes_request:
            server.read()
        ending(connection)
    return script


def in_pieces(*sizes: int) -> Script:
    """A good server that sends its token piece by piece, each when the client has taken the one before."""
    def script(connection: CancelConnection) -> None:
        server = GssServer(connection)
        server.expect_request()
        connection.send(b"G")
        rest = server.answer_to_token()
        for size in sizes:
            connection.send(rest[:size])
            rest = rest[size:]
            connection.wait_until_taken()
        connection.send(rest)
        server.read()
    return script


# With the context.

def after_handshake(ending: Ending) -> Script:
    """A whole context, nothing read after it."""
    def script(connection: CancelConnection) -> None:
        GssServer(connection).handshake()
        ending(connection)
    return script


def after_cancel_request(ending: Ending, answer: Answer | None = None) -> Script:
    """Takes the request, perhaps answers, and ends."""
    def script(connection: CancelConnection) -> None:
        server = GssServer(connection)
        server.handshake()
        server.read()
        if answer:
            answer(server)
        ending(connection)
    return script


@dataclass(frozen=True)
class Facts:
    """What a server sees of a client."""

    target: str
    delegated: bool


def take_request(facts: list[Facts]) -> Script:
    def script(connection: CancelConnection) -> None:
        server = GssServer(connection)
        server.handshake()
        facts.append(Facts(server.acceptor.target, server.acceptor.delegated))
        server.read()
        close(connection)
    return script


def pass_request_on(connection: CancelConnection, requests: list[bytes] | None = None, change: int = 0) -> None:
    """Hands what it unwraps to the real server, in the clear, and closes when that does. The last byte may be changed."""
    server = GssServer(connection)
    server.handshake()
    request = server.read()
    if requests is not None:
        requests.append(request)
    with connection.run.proxy.connect_upstream() as upstream:
        upstream.sendall(request[:-1] + bytes([request[-1] ^ change]))
        upstream.recv(1)
    close(connection)
