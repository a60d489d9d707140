"""What a server may do to a cancel connection: scripts for hostile.Run.

`start` says how the connection begins: "plain" (a CancelRequest comes at once), "tls" (SSLRequest and 'S' first) or
"direct" (a ClientHello comes at once).
"""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Callable

from certs import Certs, Pair
from hostile import DEADLINE, SSL_REQUEST, CancelConnection, Run, Script, TlsServer

# An error report that an attacker may put in a server's mouth (CVE-2024-10977): must never be shown.
FORGED_ERROR = b"E" + (30).to_bytes(4, "big") + b"SFATAL\0C28P01\0Mforged text\0\0"
CANCEL_REQUEST_SIZE = 16

Ending = Callable[[CancelConnection], None]


def tls_context(certs: Certs, pair: Pair, *, too_old: bool = False, alpn: bool = True) -> ssl.SSLContext:
    """A server's context as PostgreSQL makes it: no session tickets, client certificates asked for but not demanded."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    context.load_cert_chain(pair.cert, pair.key)
    context.load_verify_locations(certs.ca)
    context.verify_mode = ssl.CERT_OPTIONAL
    if alpn:
        context.set_alpn_protocols(["postgresql"])
    if too_old:
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    return context


# Endings: how a script leaves the connection.

def close(connection: CancelConnection) -> None:
    connection.close()


def reset(connection: CancelConnection) -> None:
    connection.reset()


def hold(connection: CancelConnection) -> None:
    connection.hold()


# Before TLS, or without it.

def begin(connection: CancelConnection, start: str) -> None:
    """Passes what comes before a CancelRequest or a ClientHello."""
    if start == "tls":
        expect_ssl_request(connection)
        connection.send(b"S")


def expect_ssl_request(connection: CancelConnection) -> None:
    request = connection.receive_packet()
    if request != SSL_REQUEST:
        raise RuntimeError(f"expected an SSLRequest, got {request.hex()}")


def at_gate(name: str, ending: Ending, after: Script | None = None) -> Script:
    """Ends the connection while the driver stands before a poll: so the order of events is certain."""
    def script(connection: CancelConnection) -> None:
        if after:
            after(connection)
        connection.run.at_gate(name, lambda: ending(connection))
    return script


def at_once(ending: Ending) -> Script:
    return ending


def after_ssl_request(ending: Ending, answer: bytes = b"") -> Script:
    """Reads the SSLRequest, perhaps answers, and ends. After 'N' an older libpq goes on in the clear: that is read too."""
    def script(connection: CancelConnection) -> None:
        expect_ssl_request(connection)
        if answer:
            connection.send(answer)
        ending(connection)
    return script


def refuse_tls_but_listen(connection: CancelConnection) -> None:
    """Answers 'N', then takes the request in the clear, as a server without TLS would."""
    expect_ssl_request(connection)
    connection.send(b"N")
    connection.receive_packet()


def after_cancel_request(ending: Ending, answer: bytes = b"") -> Script:
    """Without TLS: reads the CancelRequest, perhaps answers, and ends."""
    def script(connection: CancelConnection) -> None:
        connection.receive_packet()
        if answer:
            connection.send(answer)
        ending(connection)
    return script


def close_when_waited_for_ever(connection: CancelConnection) -> None:
    """Reads the CancelRequest, and closes only when the client waits without a limit."""
    connection.receive_packet()
    connection.run.tell_driver(b"s")
    connection.run.at_gate("for-ever", connection.close)


# In the TLS handshake and after it.

def after_client_hello(start: str, ending: Ending, answer: bytes = b"") -> Script:
    def script(connection: CancelConnection) -> None:
        begin(connection, start)
        connection.receive_record()
        if answer:
            connection.send(answer)
        ending(connection)
    return script


def in_server_flight(start: str, context: ssl.SSLContext, size: int, ending: Ending) -> Script:
    """Sends only the first bytes of its answer to the ClientHello."""
    def script(connection: CancelConnection) -> None:
        begin(connection, start)
        flight = TlsServer(connection, context).first_flight()
        if len(flight) <= size:
            raise RuntimeError(f"the whole flight is only {len(flight)} bytes")
        connection.send(flight[:size])
        ending(connection)
    return script


def bytes_before_handshake(context: ssl.SSLContext, extra: bytes) -> Script:
    """Sends 'S' and more in one packet, then a good handshake (CVE-2021-23222)."""
    def script(connection: CancelConnection) -> None:
        expect_ssl_request(connection)
        connection.send(b"S" + extra)
        tls = TlsServer(connection, context)
        tls.handshake()
        tls.read(CANCEL_REQUEST_SIZE)
    return script


def bytes_instead_of_handshake(extra: bytes) -> Script:
    """Sends 'S' and more in one packet, then closes in the middle of the handshake."""
    def script(connection: CancelConnection) -> None:
        expect_ssl_request(connection)
        connection.send(b"S" + extra)
        connection.receive_record()
    return script


def after_handshake(start: str, context: ssl.SSLContext, ending: Ending) -> Script:
    """A whole handshake, nothing read after it."""
    def script(connection: CancelConnection) -> None:
        begin(connection, start)
        TlsServer(connection, context).handshake()
        ending(connection)
    return script


def after_tls_cancel_request(start: str, context: ssl.SSLContext, ending: Ending, answer: bytes = b"",
                             close_notify: bool = False) -> Script:
    """Takes the request inside TLS, perhaps answers, and ends."""
    def script(connection: CancelConnection) -> None:
        begin(connection, start)
        tls = TlsServer(connection, context)
        tls.handshake()
        tls.read(CANCEL_REQUEST_SIZE)
        if answer:
            tls.write(answer)
        if close_notify:
            tls.close_notify()
        ending(connection)
    return script


# Between the session and the first cancel connection: what a Run calls as `between`. False: accept no more.

def with_certificate(name: str) -> Callable[[Certs], Script]:
    """For Scenario.script: TLS with this one of Certs, until the request has come."""
    return lambda certs: after_tls_cancel_request("tls", tls_context(certs, getattr(certs, name)), close)


def nobody_listens(run: Run) -> bool:
    run.proxy.refuse()
    return False


def socket_removed(run: Run) -> bool:
    """The Unix socket's file is gone."""
    Path(run.proxy.path).unlink()
    return False


def queue_full(run: Run) -> bool:
    """The listener's queue is full and nobody takes from it: TCP connects hang, those to Unix sockets fail at once."""
    run.listener.listen(0)
    filler = socket.socket(run.listener.family)
    filler.settimeout(DEADLINE)
    filler.connect(run.listener.getsockname())
    run.open.append(filler)
    run.tell_driver(b"s")
    return False


def another_user_listens(run: Run) -> bool:
    """The peer of later connections is nobody: the kernel takes it from the process that last called listen()."""
    program = "import socket, sys; socket.socket(fileno=int(sys.argv[1])).listen(16)"
    subprocess.run([sys.executable, "-c", program, str(run.listener.fileno())], check=True, user="nobody",
                   pass_fds=[run.listener.fileno()], env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, cwd="/")
    return True
