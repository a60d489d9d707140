"""What an eavesdropper reads of a cancel connection."""

from __future__ import annotations

import hashlib
import re
import struct

from hostile import SSL_REQUEST, CancelConnection

CANCEL_REQUEST_CODE = bytes.fromhex("04d2162e")
# With its length before it, at most 268: four bytes alone may come by chance in what is encrypted.
CANCEL_REQUEST = re.compile(rb"\0\0[\0\1]." + re.escape(CANCEL_REQUEST_CODE), re.DOTALL)
# RFC 8446, section 4.1.3: a ServerHello with this random is a HelloRetryRequest.
HELLO_RETRY_REQUEST = hashlib.sha256(b"HelloRetryRequest").digest()

GSSENC_REQUEST = bytes.fromhex("0000000804d21630")
RECORD_HEADER = 5
APPLICATION_DATA = 23
RECORD_TYPES = range(20, 24)
TLS13_OVERHEAD = 17  # what TLS 1.3 adds to what it encrypts: the type, and the tag
# RFC 4121, section 4.2.4: what GSSAPI adds with the encryption of Realm.enctype: header, confounder, header again, checksum.
GSS_OVERHEAD = 16 + 16 + 16 + 12
SEALED_CANCEL_REQUEST = 16 + TLS13_OVERHEAD
SEALED_CANCEL_REQUESTS = (SEALED_CANCEL_REQUEST, 16 + GSS_OVERHEAD)  # told by their size
GSS_LENGTH = 4  # bytes before every token and every packet
FIRST_TOKEN, PACKET = b"\x60", b"\x05\x04"  # how they begin
SEALED = 2  # flag of a packet, in the byte after that

SERVER_NAME, ALPN, SUPPORTED_VERSIONS = 0, 16, 43
CLIENT_HELLO = 1


def summary(connection: CancelConnection) -> str:
    """What the client sent, in one line that is the same for every cancel of the same kind: no keys, no random bytes."""
    sent = connection.sent_by_client
    parts = []
    if sent.startswith(GSSENC_REQUEST):
        parts.append("GSSENCRequest")
        frames, sent = _gss_frames(sent[len(GSSENC_REQUEST):])
        parts += map(_gss_frame, frames)
    if sent.startswith(SSL_REQUEST):
        parts.append("SSLRequest")
        sent = sent[len(SSL_REQUEST):]
    if sent[4:8] == CANCEL_REQUEST_CODE:
        parts.append(f"CancelRequest of {len(sent)} bytes in the clear")
    elif sent.startswith(b"\x16\x03"):
        parts.append(_client_hello(sent))
    elif sent:
        parts.append(f"unknown: {sent.hex()}")
    if connection.peer_certificate:
        parts.append("client certificate " + hashlib.sha256(connection.peer_certificate).hexdigest()[:8])
    return ", ".join(parts)


def _gss_frames(sent: bytes) -> tuple[list[bytes], bytes]:
    """Tokens and packets; and what comes after them, if it is neither or not complete."""
    frames = []
    while sent[GSS_LENGTH:].startswith((FIRST_TOKEN, PACKET)):
        end = GSS_LENGTH + int.from_bytes(sent[:GSS_LENGTH], "big")
        if len(sent) < end:
            break
        frames.append(sent[GSS_LENGTH:end])
        sent = sent[end:]
    return frames, sent


def _is_sealed(frame: bytes) -> bool:
    return frame.startswith(PACKET) and bool(frame[len(PACKET)] & SEALED)


def _gss_frame(frame: bytes) -> str:
    """How long a token is depends on the ticket."""
    if frame.startswith(FIRST_TOKEN):
        return "token"
    return f"packet of {len(frame)} bytes{'' if _is_sealed(frame) else ' that is not encrypted'}"


def is_readable(connection: CancelConnection) -> bool:
    """Does a CancelRequest stand on the wire in the clear?"""
    return CANCEL_REQUEST.search(connection.sent_by_client) is not None


def read(connection: CancelConnection) -> tuple[bytes, list[int]]:
    """What the client sent outside TLS and GSSAPI encryption, and the sizes of what it sent encrypted."""
    rest, clear, sealed = connection.sent_by_client, b"", []
    while rest.startswith((SSL_REQUEST, GSSENC_REQUEST)):
        clear, rest = clear + rest[:8], rest[8:]
    frames, rest = _gss_frames(rest)
    sealed += [len(frame) for frame in frames if _is_sealed(frame)]
    clear += b"".join(frame for frame in frames if not _is_sealed(frame))
    while len(rest) >= RECORD_HEADER and rest[0] in RECORD_TYPES and rest[1] == 3:
        size = int.from_bytes(rest[3:RECORD_HEADER], "big")
        if rest[0] == APPLICATION_DATA:
            sealed.append(size)
        rest = rest[RECORD_HEADER + size:]
    return clear + rest, sealed


def is_retried(connection: CancelConnection) -> bool:
    """Did the handshake take a HelloRetryRequest, and with it one more round trip?"""
    return HELLO_RETRY_REQUEST in connection.sent_by_server


def _client_hello(sent: bytes) -> str:
    """The parts of a ClientHello that a server or a router chooses by."""
    body = sent[9:]
    if sent[5] != CLIENT_HELLO:
        return "TLS without ClientHello"
    position = 2 + 32  # version, random
    position += 1 + body[position]  # session ID
    position += 2 + struct.unpack_from("!H", body, position)[0]  # cipher suites
    position += 1 + body[position]  # compression methods
    end = position + 2 + struct.unpack_from("!H", body, position)[0]
    position += 2
    found: dict[int, bytes] = {}
    while position < end:
        kind, size = struct.unpack_from("!HH", body, position)
        found[kind] = body[position + 4:position + 4 + size]
        position += 4 + size
    name = found[SERVER_NAME][5:].decode() if SERVER_NAME in found else None
    alpn = found[ALPN][3:].decode() if ALPN in found else None
    offered = found.get(SUPPORTED_VERSIONS, b"")
    versions = [offered[i:i + 2].hex() for i in range(1, len(offered), 2)]
    return f"ClientHello(sni={name}, alpn={alpn}, versions={'+'.join(versions) or 'old style'})"
