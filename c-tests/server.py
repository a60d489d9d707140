"""A private PostgreSQL server for the tests: its own directory, a free port, TLS on, trust authentication."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Iterator

from certs import Certs

HBA = """
local all all trust
host  all all 127.0.0.1/32 trust
host  all all ::1/128      trust
"""

# Settings that make a throw-away server start fast; what a caller passes comes after and wins.
SETTINGS = {
    "fsync": "off",
    "ssl": "on",
    "ssl_cert_file": "server.crt",
    "ssl_key_file": "server.key",
    "ssl_ca_file": "ca.crt",
    "logging_collector": "off",
    "log_connections": "on",
    "authentication_timeout": "600",  # under valgrind a client takes its time
    "max_connections": "100",
    "shared_buffers": "16MB",
}

START_TIMEOUT = 300  # seconds
FIRST_WITH_ABSTRACT = 14


class Postgres:
    """A running server, for use in a `with` statement.

    Listens on 127.0.0.1, on ::1 where the machine has IPv6, and on two Unix sockets (socket_dir, and from PostgreSQL 14 on
    abstract_dir, which is in Linux's abstract namespace); all with the same port number.
    """

    host = "127.0.0.1"
    superuser = "postgres"

    def __init__(self, prefix: Path, certs: Certs, *, settings: dict[str, str] | None = None, hba: str | None = None,
                 environment: dict[str, str] | None = None, client_environment: dict[str, str] | None = None):
        """environment is added to the server's own, and client_environment to that of its clients."""
        self.prefix, self.certs, self.hba = Path(prefix), certs, hba or HBA
        self.settings = {**SETTINGS, **(settings or {})}
        self.environment, self.client_environment = environment or {}, client_environment or {}
        self.port = 0
        self.ipv6 = has_ipv6()

    def __enter__(self) -> "Postgres":
        self.directory = Path(tempfile.mkdtemp(prefix="pqcancel-pg-"))
        try:
            self._prepare()
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception) -> None:
        if (self.data / "postmaster.pid").exists():
            self._run("pg_ctl", "stop", "--wait", "--mode=immediate", "--silent", f"--pgdata={self.data}", check=False)
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def data(self) -> Path:
        return self.directory / "data"

    @property
    def socket_dir(self) -> Path:
        return self.directory

    @property
    def abstract_dir(self) -> str:
        """What goes into a conninfo as host to use the abstract socket."""
        return f"@{self.directory.name}"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def conninfo(self, **options) -> str:
        """A conninfo string for the superuser over TCP; options add to it or change it."""
        values = {"host": self.host, "port": self.port, "user": self.superuser, "dbname": "postgres", **options}
        return conninfo(**values)

    def _prepare(self) -> None:
        self.user = server_user()
        if self.user:
            os.chown(self.directory, self.user.pw_uid, self.user.pw_gid)
        self.directory.chmod(0o755)  # so that any user reaches the Unix socket
        if not self._can_run(self.prefix):
            # A prefix below a home directory that the server's user may not enter.
            self.prefix = Path(shutil.copytree(self.prefix, self.directory / "prefix", symlinks=True))
        self._run("initdb", f"--pgdata={self.data}", "--username=postgres", "--auth=trust", "--no-locale",
                  "--encoding=UTF8", "--no-sync")
        for source, name in ((self.certs.server.cert, "server.crt"), (self.certs.server.key, "server.key"),
                             (self.certs.ca, "ca.crt")):
            self._install(source.read_bytes(), name)
        self._install(self.hba.encode(), "pg_hba.conf")

    def _start(self) -> None:
        """Starts on a free port, which is kept free for it."""
        addresses = [self.host] + (["::1"] if self.ipv6 else [])
        major = int((self.data / "PG_VERSION").read_text())
        socket_dirs = [self.socket_dir, self.abstract_dir] if major >= FIRST_WITH_ABSTRACT else [self.socket_dir]
        with reserved_port(addresses) as self.port:
            settings = {"port": str(self.port), "listen_addresses": ",".join(addresses),
                        "unix_socket_directories": ",".join(map(str, socket_dirs)), **self.settings}
            lines = [f"{name} = '{value}'\n" for name, value in settings.items()]
            self._install("".join(lines).encode(), "postgresql.auto.conf")
            if not self._run("pg_ctl", "start", "--wait", f"--timeout={START_TIMEOUT}", "--silent", f"--pgdata={self.data}",
                             f"--log={self.log}", check=False):
                raise RuntimeError(f"the server does not start:\n{self.log.read_text()}")

    def _install(self, content: bytes, name: str) -> None:
        """Writes a file into the data directory as the server wants it: its own, and private."""
        path = self.data / name
        path.write_bytes(content)
        path.chmod(0o600)
        if self.user:
            os.chown(path, self.user.pw_uid, self.user.pw_gid)

    def _identity(self) -> dict:
        if not self.user:
            return {}
        return {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []}

    def _environment(self) -> dict[str, str]:
        """Without PG* variables of the caller; with the prefix's own libraries where it brings them along."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LD_"))}
        environment.update(LC_ALL="C", TZ="UTC", **self.environment)
        if (self.prefix / "lib" / "libpq.so.5").exists():
            environment["LD_LIBRARY_PATH"] = str(self.prefix / "lib")
        return environment

    def _can_run(self, prefix: Path) -> bool:
        try:
            return subprocess.run([prefix / "bin" / "postgres", "--version"], capture_output=True, cwd="/",
                                  env=self._environment(), **self._identity()).returncode == 0
        except PermissionError:
            return False

    def _run(self, program: str, *arguments: str, check: bool = True) -> bool:
        # Output goes to a file: the server that pg_ctl leaves behind would keep a pipe open.
        with tempfile.TemporaryFile() as output:
            result = subprocess.run([self.prefix / "bin" / program, *arguments], stdin=subprocess.DEVNULL, stdout=output,
                                    stderr=subprocess.STDOUT, cwd="/", env=self._environment(), **self._identity())
            output.seek(0)
            if check and result.returncode != 0:
                raise RuntimeError(f"{program} failed:\n{output.read().decode(errors='replace')}")
        return result.returncode == 0


def conninfo(**options) -> str:
    """A conninfo string out of keyword arguments; None leaves an option out."""
    quoted = {name: str(value).replace("\\", "\\\\").replace("'", "\\'") for name, value in options.items()
              if value is not None}
    return " ".join(f"{name}='{value}'" for name, value in quoted.items())


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
        return True
    except OSError:
        return False


@contextmanager
def reserved_port(addresses: list[str]) -> Iterator[int]:
    """A port that is free on all the addresses. Meanwhile only who names it can bind to it, with SO_REUSEADDR as servers do."""
    while True:
        with ExitStack() as stack:
            port = 0
            try:
                for address in addresses:
                    probe = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET))
                    probe.bind((address, port))
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # from now on
                    port = probe.getsockname()[1]
            except OSError:
                if port == 0:  # not even one address to bind to
                    raise
                continue  # the kernel chose one that is free on the first address only
            yield port
            return


def server_user() -> pwd.struct_passwd | None:
    """PostgreSQL refuses to run as root: then it runs as the user postgres. Otherwise as whoever we are."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")
