"""What an eavesdropper can read in a recorded connection: PostgreSQL's opening packets, and TLS from outside.

Nothing here decrypts anything. PostgreSQL's side is "Message Formats" in its documentation;
TLS's is RFC 5246 and RFC 8446.
"""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass, field

from eavesdrop import CLIENT, SERVER, Connection

CANCEL_REQUEST = 80877102
OPENINGS = {80877103: "SSLRequest", 80877104: "GSSENCRequest", CANCEL_REQUEST: "CancelRequest"}
ANSWERS = {b"S": "'S': go on with TLS", b"G": "'G': go on with GSS", b"N": "'N': no encryption", b"E": "'E': error"}

CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA = 20, 21, 22, 23
CLIENT_HELLO, SERVER_HELLO = 1, 2
SERVER_NAME, ALPN, SUPPORTED_VERSIONS, KEY_SHARE = 0, 16, 43, 51
VERSIONS = {0x0301: "TLSv1.0", 0x0302: "TLSv1.1", 0x0303: "TLSv1.2", 0x0304: "TLSv1.3"}
GROUPS = {23: "secp256r1", 24: "secp384r1", 25: "secp521r1", 29: "x25519", 30: "x448", 4588: "X25519MLKEM768"}
RETRY_RANDOM = hashlib.sha256(b"HelloRetryRequest").digest()  # RFC 8446, 4.1.3

RECORD_HEADER = 5
# A TLS 1.3 record hides its type in one more byte and ends in a tag of 16: an alert, two bytes, makes 19.
TLS13_OVERHEAD = 17
TLS13_ALERT = 2 + TLS13_OVERHEAD


@dataclass(frozen=True)
class Event:
    """One thing that was seen to happen. `data` is what was on the wire, headers included."""

    time: float  # seconds since the client connected
    sender: str
    what: str
    data: bytes = b""


@dataclass(frozen=True)
class CancelRequest:
    """A cancel request that could be read."""

    pid: int
    key: bytes
    packet: bytes


@dataclass(frozen=True)
class Record:
    """One TLS record."""

    time: float
    sender: str
    type: int
    body: bytes
    data: bytes  # header and body


@dataclass
class Reading:
    """All that a connection gave away."""

    events: list[Event] = field(default_factory=list)
    version: str = ""  # of TLS; empty if the connection did not use it
    cipher: str = ""
    cancel: CancelRequest | None = None
    sealed: Record | None = None  # the client's last encrypted data; on a cancel connection that is the request


def read(connection: Connection, carries: str = "data") -> Reading:
    """Reads a connection from its recording. What is encrypted goes by the name of what it is known to carry."""
    reading = Reading([Event(0.0, CLIENT, "connects")])
    client, server = _Stream(connection, CLIENT), _Stream(connection, SERVER)
    while client.rest() and not client.rest().startswith(bytes([HANDSHAKE])):
        packet = client.packet()
        name = _opening(packet, reading)
        reading.events.append(Event(client.time, CLIENT, name, packet))
        if not name.endswith("Request") or name == "CancelRequest":
            break  # a session in plaintext, or a cancel request: nothing of ours follows
        answer = server.take(1)
        reading.events.append(Event(server.time, SERVER, ANSWERS.get(answer, f"answers {answer!r}"), answer))
    else:
        _read_tls(reading, client, server, carries)
    for chunk in connection.chunks:
        if not chunk.data:
            reading.events.append(Event(chunk.time, chunk.sender, "closes the connection"))
    reading.events.sort(key=lambda event: event.time)  # stable: the order of each sender stays
    return reading


class _Stream:
    """What one side sent, taken from the front; `time` is when the last byte taken had come."""

    def __init__(self, connection: Connection, sender: str):
        self.sender, self.time, self._at = sender, 0.0, 0
        self._data = connection.sent_by(sender)
        self._arrivals: list[tuple[int, float]] = []  # (bytes so far, time)
        for chunk in connection.chunks:
            if chunk.sender == sender and chunk.data:
                before = self._arrivals[-1][0] if self._arrivals else 0
                self._arrivals.append((before + len(chunk.data), chunk.time))

    def rest(self) -> bytes:
        return self._data[self._at:]

    def take(self, size: int) -> bytes:
        taken = self.rest()[:size]
        self._at += len(taken)
        self.time = next((time for end, time in self._arrivals if end >= self._at), self.time)
        return taken

    def packet(self) -> bytes:
        """A packet that begins with its length, as all do that open a PostgreSQL connection."""
        return self.take(max(4, int.from_bytes(self.rest()[:4], "big")))

    def records(self) -> list[Record]:
        found = []
        while len(self.rest()) >= RECORD_HEADER:
            header = self.rest()[:RECORD_HEADER]
            data = self.take(RECORD_HEADER + int.from_bytes(header[3:], "big"))
            found.append(Record(self.time, self.sender, header[0], data[RECORD_HEADER:], data))
        return found


def _opening(packet: bytes, reading: Reading) -> str:
    """Names a packet that opens a connection, and notes what a CancelRequest says."""
    code = int.from_bytes(packet[4:8], "big")
    if code == CANCEL_REQUEST:
        reading.cancel = CancelRequest(int.from_bytes(packet[8:12], "big"), packet[12:], packet)
    return OPENINGS.get(code, f"StartupMessage, protocol {code >> 16}.{code & 0xFFFF}")


def _read_tls(reading: Reading, client: _Stream, server: _Stream, carries: str) -> None:
    # The server's side first: its ServerHello tells the version, which says how to take the client's records.
    for record in server.records():
        reading.events.append(Event(record.time, SERVER, _name(record, reading), record.data))
    ours = client.records()
    reading.sealed = _last_data(ours, reading.version)
    for record in ours:
        name = f"{carries}, encrypted" if record is reading.sealed else _name(record, reading)
        reading.events.append(Event(record.time, CLIENT, name, record.data))


def _last_data(records: list[Record], version: str) -> Record | None:
    """The client's last record of data. In TLS 1.3 Finished, which comes before data, and alerts look like data too."""
    data = [record for record in records if record.type == APPLICATION_DATA]
    if version == "TLSv1.3":
        data = [record for record in data if len(record.body) != TLS13_ALERT]
    return data[-1] if data else None


def _name(record: Record, reading: Reading) -> str:
    if record.type == CHANGE_CIPHER_SPEC:
        return "ChangeCipherSpec"
    if record.type == ALERT:
        return "alert"
    if record.type == APPLICATION_DATA and reading.version == "TLSv1.3":
        return "alert, encrypted" if len(record.body) == TLS13_ALERT else "handshake, encrypted"
    if _is_message(record, CLIENT, CLIENT_HELLO):
        return _client_hello(record.body)
    if _is_message(record, SERVER, SERVER_HELLO):
        return _server_hello(record.body, reading)
    return "handshake" if record.type == HANDSHAKE else "data, encrypted"


def _is_message(record: Record, sender: str, kind: int) -> bool:
    """Whether the record begins with such a handshake message; in TLS 1.2's encrypted ones the length does not fit."""
    fits = int.from_bytes(record.body[1:4], "big") + 4 <= len(record.body)
    return record.type == HANDSHAKE and record.sender == sender and record.body[:1] == bytes([kind]) and fits


class _Fields:
    """Reads TLS's length-prefixed fields from the front."""

    def __init__(self, data: bytes):
        self.data = data

    def take(self, size: int) -> bytes:
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        return self.take(self.number(size))

    def extensions(self) -> dict[int, bytes]:
        found, rest = {}, _Fields(self.vector(2))
        while rest.data:
            kind = rest.number(2)
            found[kind] = rest.vector(2)
        return found


def _client_hello(body: bytes) -> str:
    fields = _Fields(body[4:])  # after the type and the length of the message
    fields.take(2 + 32)  # the version of old, random
    fields.vector(1)  # session id
    fields.vector(2)  # cipher suites
    fields.vector(1)  # compression methods
    extensions = fields.extensions()
    told = []
    if SERVER_NAME in extensions:
        told.append("server name " + extensions[SERVER_NAME][5:].decode("ascii", "replace"))
    if ALPN in extensions:
        told.append("ALPN " + _Fields(extensions[ALPN][2:]).vector(1).decode("ascii", "replace"))
    return f"ClientHello ({', '.join(told)})" if told else "ClientHello"


def _server_hello(body: bytes, reading: Reading) -> str:
    fields = _Fields(body[4:])
    version = fields.number(2)
    random = fields.take(32)
    fields.vector(1)  # session id
    cipher = fields.number(2)
    fields.take(1)  # compression method
    extensions = fields.extensions()
    version = int.from_bytes(extensions.get(SUPPORTED_VERSIONS, version.to_bytes(2, "big")), "big")
    group = int.from_bytes(extensions.get(KEY_SHARE, b"")[:2], "big")
    if random == RETRY_RANDOM:
        return f"HelloRetryRequest (wants {GROUPS.get(group, group)}: one more round trip)"
    reading.version = VERSIONS.get(version, f"TLS {version:#06x}")
    reading.cipher = _cipher_names().get(cipher, f"{cipher:#06x}")
    chosen = [reading.version, reading.cipher] + ([GROUPS.get(group, str(group))] if group else [])
    return f"ServerHello ({', '.join(chosen)})"


def _cipher_names() -> dict[int, str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("ALL")
    return {cipher["id"] & 0xFFFF: cipher["name"] for cipher in context.get_ciphers()}


def merged(events: list[Event]) -> list[Event]:
    """The events, with what one side sent under one name in one go put into one."""
    result = events[:1]
    for before, event in zip(events, events[1:]):
        if (event.sender, event.what) == (before.sender, before.what):
            last = result.pop()
            event = Event(last.time, event.sender, event.what, last.data + event.data)
        result.append(event)
    return result
