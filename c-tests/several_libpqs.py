"""A Python program with several libpqs at once. Each line of its input names something to do, mostly with one of them; it
answers with the same line and what came of it. test_one_process.py starts it in a terminal.

    several_libpqs.py CONNINFO
"""

from __future__ import annotations

import _ctypes
import ctypes
import hashlib
import importlib
import re
import ssl
import sys
import threading
import urllib.request
from pathlib import Path

QUERY = "select pg_sleep(600)"
ANSWER = "select 6 * 7"
CONNECTION_OK = 0
SQLSTATE_FIELD = ord("C")
ERRBUF_SIZE = 256
LIBPQ = re.compile(r"/\S+/libpq-?\w*\.so\.5\.\d+$", re.MULTILINE)  # the files, as wheels and Debian name them


class Psycopg2:
    """psycopg2 with a libpq of its own. Each session takes one PGcancel when it is made, and keeps it."""

    def __init__(self):
        self.driver = importlib.import_module("psycopg2")

    def version(self) -> int:
        return self.driver.extensions.libpq_version()

    def connect(self, conninfo: str) -> None:
        self.session = self.driver.connect(conninfo)

    def address(self) -> int:
        return self.session.pgconn_ptr

    def pid(self) -> int:
        return self.session.info.backend_pid

    def execute(self) -> str:
        try:
            self.session.cursor().execute(QUERY)
        except self.driver.Error as error:
            return getattr(error, "sqlstate", None) or error.pgcode
        return "00000"

    def answer(self) -> str:
        self.session.rollback()
        cursor = self.session.cursor()
        cursor.execute(ANSWER)
        return str(cursor.fetchone()[0])

    def cancel(self) -> str:
        self.session.cancel()
        return "delivered"

    def close(self) -> None:
        self.session.close()


class Psycopg(Psycopg2):
    """psycopg's C implementation with a libpq of its own."""

    def __init__(self):
        self.driver = importlib.import_module("psycopg")

    def version(self) -> int:
        return self.driver.pq.version()

    def address(self) -> int:
        return self.session.pgconn.pgconn_ptr

    def cancel_safe(self) -> str:
        self.session.cancel_safe()
        return "delivered"


class Libpq:
    """A libpq that is called through ctypes. Its functions are looked up in its handle, but those that cancel may come from
    elsewhere."""

    mode = ctypes.DEFAULT_MODE

    def __init__(self, file: str, cancelled_by: str = "handle"):
        self.library = ctypes.CDLL(file, self.mode)
        self.canceller = ctypes.CDLL(None) if cancelled_by == "process" else self.library

    def version(self) -> int:
        return self.library.PQlibVersion()

    def connect(self, conninfo: str) -> None:
        self.session = pointer_from(self.library.PQconnectdb, conninfo.encode())
        if self.library.PQstatus(self.session) != CONNECTION_OK:
            raise RuntimeError(text_from(self.library.PQerrorMessage, self.session))

    def address(self) -> int:
        return self.session.value

    def pid(self) -> int:
        return self.library.PQbackendPID(self.session)

    def execute(self) -> str:
        result = pointer_from(self.library.PQexec, self.session, QUERY.encode())
        sqlstate = text_from(self.library.PQresultErrorField, result, SQLSTATE_FIELD)
        self.library.PQclear(result)
        return sqlstate or "00000"

    def answer(self) -> str:
        result = pointer_from(self.library.PQexec, self.session, ANSWER.encode())
        value = text_from(self.library.PQgetvalue, result, 0, 0)
        self.library.PQclear(result)
        return value

    def cancel(self) -> str:
        errbuf = ctypes.create_string_buffer(ERRBUF_SIZE)
        cancel = pointer_from(self.canceller.PQgetCancel, self.session)
        delivered = self.canceller.PQcancel(cancel, errbuf, ERRBUF_SIZE)
        self.canceller.PQfreeCancel(cancel)
        return "delivered" if delivered else errbuf.value.decode().rstrip("\n")

    def cancel_safe(self) -> str:
        cancel = pointer_from(self.canceller.PQcancelCreate, self.session)
        delivered = self.canceller.PQcancelBlocking(cancel)
        message = text_from(self.canceller.PQcancelErrorMessage, cancel)
        self.canceller.PQcancelFinish(cancel)
        return "delivered" if delivered else message.rstrip("\n")

    def request_cancel(self) -> str:
        return "delivered" if self.canceller.PQrequestCancel(self.session) else "not delivered"

    def close(self) -> None:
        self.library.PQfinish(self.session)

    def unload(self) -> None:
        _ctypes.dlclose(self.library._handle)


class GlobalLibpq(Libpq):
    """What is loaded later finds its functions before those of a libpq of its own."""

    mode = ctypes.RTLD_GLOBAL


class Plugin(Libpq):
    """plugin.c: linked with a libpq of its own, and the one who calls the functions that cancel."""

    def cancel(self) -> str:
        return self.cancelled_by(self.library.plugin_cancel)

    def cancel_safe(self) -> str:
        return self.cancelled_by(self.library.plugin_cancel_safe)

    def cancelled_by(self, function) -> str:
        errbuf = ctypes.create_string_buffer(ERRBUF_SIZE)
        return "delivered" if function(self.session, errbuf, ERRBUF_SIZE) else errbuf.value.decode().rstrip("\n")

    def place(self) -> int:
        return ctypes.cast(self.library.plugin_cancel, ctypes.c_void_p).value


def pointer_from(function, *arguments) -> ctypes.c_void_p:
    function.restype = ctypes.c_void_p
    return ctypes.c_void_p(function(*arguments))


def text_from(function, *arguments) -> str:
    function.restype = ctypes.c_char_p
    return (function(*arguments) or b"").decode()


def mapped() -> set[Path]:
    """The files of the libpqs that are in this process."""
    return {Path(file) for file in LIBPQ.findall(Path("/proc/self/maps").read_text())}


class Program:
    """The things to do."""

    kinds = {"psycopg2": Psycopg2, "psycopg": Psycopg, "system": Libpq, "global": GlobalLibpq, "plugin": Plugin}

    def __init__(self, conninfo: str):
        self.conninfo = conninfo
        self.libpqs: dict[str, Psycopg2 | Libpq] = {}
        self.queries: dict[str, threading.Thread] = {}
        self.ends: dict[str, str] = {}

    def open(self, name: str, *arguments: str) -> str:
        self.libpqs[name] = opened = self.kinds[name](*arguments)
        opened.connect(self.conninfo)
        return f"on libpq {opened.version() // 10000}"

    def query(self, name: str) -> str:
        def execute() -> None:
            self.ends[name] = self.libpqs[name].execute()

        self.queries[name] = threading.Thread(target=execute)
        self.queries[name].start()
        return "begins"

    def cancel(self, name: str) -> str:
        return self.libpqs[name].cancel()

    def cancel_safe(self, name: str) -> str:
        return self.libpqs[name].cancel_safe()

    def request_cancel(self, name: str) -> str:
        return self.libpqs[name].request_cancel()

    def end(self, name: str) -> str:
        """Of the query; and then the session's answer to another one."""
        self.queries[name].join()
        return f"{self.ends[name]}, {self.libpqs[name].answer()}"

    def close(self, name: str) -> str:
        self.libpqs[name].close()
        return "closed"

    def unload(self, name: str) -> str:
        self.libpqs.pop(name).unload()
        return "unloaded"

    def place(self, name: str) -> str:
        """Where the code is that calls the functions that cancel."""
        return hex(self.libpqs[name].place())

    def mapped(self) -> str:
        return " ".join(sorted(file.name for file in mapped()))

    def readers(self, name: str) -> str:
        """The libpqs that read the session's backend PID out of it: each has its own layout of a PGconn."""
        session = self.libpqs[name]
        handles = {file.name: ctypes.CDLL(str(file)) for file in mapped()}
        right = [file for file, handle in handles.items()
                 if handle.PQbackendPID(ctypes.c_void_p(session.address())) == session.pid()]
        for handle in handles.values():
            _ctypes.dlclose(handle._handle)
        return " ".join(right)

    def visit(self, port: str, ca: str) -> str:
        """The website, with Python's own OpenSSL."""
        context = ssl.create_default_context(cafile=ca)
        with urllib.request.urlopen(f"https://127.0.0.1:{port}/", context=context) as page:
            return f"{page.read().decode()} {hashlib.sha256(b'abc').hexdigest()[:8]}"


def main() -> None:
    program = Program(sys.argv[1])
    for line in sys.stdin:
        verb, *words = line.split()
        try:
            outcome = getattr(program, verb)(*words)
        except Exception as error:
            outcome = f"{type(error).__name__} {error}".splitlines()[0]
        print(f"{line.rstrip()}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
