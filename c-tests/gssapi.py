"""The server's side of GSSAPI, by the machine's own libgssapi_krb5: so that a script can play a server that clients accept.

It needs Realm.acceptor_environment in this process.
"""

from __future__ import annotations

import struct
from ctypes import CDLL, Structure, addressof, byref, c_int, c_size_t, c_uint32, c_void_p, create_string_buffer, string_at

from hostile import CancelConnection

LIBRARY = "libgssapi_krb5.so.2"
CONTINUE_NEEDED = 1
IS_ERROR = 0xFFFF0000  # of a major status: what is no mere information
DELEGATION = 1  # GSS_C_DELEG_FLAG
CODES = (1, 2)  # what gss_display_status() tells of: a major status, a minor one of the mechanism

GSSENC_REQUEST = struct.pack("!II", 8, 80877104)


class Error(Exception):
    """A function of GSSAPI failed: the client's token or packet is no good, or there is no key to read it with."""


class Buffer(Structure):
    """gss_buffer_desc"""

    _fields_ = [("length", c_size_t), ("value", c_void_p)]


def filled(data: bytes) -> Buffer:
    content = create_string_buffer(data, len(data))
    buffer = Buffer(len(data), addressof(content))
    buffer.content = content  # lives as long as the buffer does
    return buffer


class Acceptor:
    """One security context."""

    def __init__(self) -> None:
        self.library = CDLL(LIBRARY)
        self.context = c_void_p()
        self.flags = c_uint32()
        self.established = False

    def accept(self, token: bytes) -> bytes:
        """Takes the client's token; returns the one that answers it."""
        answer = Buffer()
        major = self._call("gss_accept_sec_context", byref(self.context), None, byref(filled(token)), None, None, None,
                           byref(answer), byref(self.flags), None, None)
        self.established = major != CONTINUE_NEEDED
        return self._taken(answer)

    @property
    def delegated(self) -> bool:
        """Did the client hand over its own tickets?"""
        return bool(self.flags.value & DELEGATION)

    @property
    def target(self) -> str:
        """The service that the client's ticket is for."""
        name, text = c_void_p(), Buffer()
        self._call("gss_inquire_context", self.context, None, byref(name), None, None, None, None, None)
        self._call("gss_display_name", name, byref(text), None)
        self._call("gss_release_name", byref(name))
        return self._taken(text).decode()

    def wrap(self, data: bytes, confidential: bool = True) -> bytes:
        packet = Buffer()
        self._call("gss_wrap", self.context, c_int(confidential), 0, byref(filled(data)), None, byref(packet))
        return self._taken(packet)

    def unwrap(self, packet: bytes) -> bytes:
        """What the client wrote; an error also where it is not confidential."""
        data, confidential = Buffer(), c_int()
        self._call("gss_unwrap", self.context, byref(filled(packet)), byref(data), byref(confidential), None)
        if not confidential.value:
            raise Error("the client's packet is not confidential")
        return self._taken(data)

    def close(self) -> None:
        self._call("gss_delete_sec_context", byref(self.context), None)

    def _taken(self, buffer: Buffer) -> bytes:
        data = string_at(buffer.value, buffer.length) if buffer.length else b""
        self._call("gss_release_buffer", byref(buffer))
        return data

    def _call(self, function: str, *arguments) -> int:
        minor = c_uint32()
        major = c_uint32(getattr(self.library, function)(byref(minor), *arguments)).value
        if major & IS_ERROR:
            raise Error(f"{function}: {'; '.join(map(self._words, (major, minor.value), CODES))}")
        return major

    def _words(self, status: int, code: int) -> str:
        minor, more, text = c_uint32(), c_uint32(), Buffer()
        self.library.gss_display_status(byref(minor), c_uint32(status), c_int(code), None, byref(more), byref(text))
        return string_at(text.value, text.length).decode() if text.length else str(status)


def framed(content: bytes) -> bytes:
    """As tokens and packets are on the wire: the length first."""
    return struct.pack("!I", len(content)) + content


class GssServer:
    """The server's side of GSSAPI encryption over a CancelConnection, under the script's control."""

    def __init__(self, connection: CancelConnection):
        self.connection = connection
        self.acceptor = Acceptor()

    def expect_request(self) -> None:
        request = self.connection.receive_packet()
        if request != GSSENC_REQUEST:
            raise RuntimeError(f"expected a GSSENCRequest, got {request.hex()}")

    def answer_to_token(self) -> bytes:
        """Reads the client's token; returns, and does not send, what answers it."""
        return framed(self.acceptor.accept(self._receive()))

    def handshake(self) -> None:
        self.expect_request()
        self.connection.send(b"G")
        while not self.acceptor.established:
            self.connection.send(self.answer_to_token())

    def read(self) -> bytes:
        return self.acceptor.unwrap(self._receive())

    def write(self, data: bytes, confidential: bool = True) -> None:
        self.connection.send(framed(self.acceptor.wrap(data, confidential)))

    def _receive(self) -> bytes:
        return self.connection.receive(struct.unpack("!I", self.connection.receive(4))[0])
