"""A private pgbouncer for the tests: its own directory, a free port, its own cancel keys for its clients."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from certs import Certs
from monitor import wait_until
from server import conninfo, reserved_port, server_user

PGBOUNCER = Path("/usr/sbin/pgbouncer")


class Pooler:
    """pgbouncer in front of the server at a port of 127.0.0.1, for use in a `with` statement. It may stand where a Postgres
    is asked for by its port and its conninfo.

    Its own sessions on the server are over TLS, verified. Those of its clients have to be over TLS, or cannot be.
    """

    host = "127.0.0.1"
    superuser = "postgres"

    def __init__(self, server_port: int, certs: Certs, *, tls: bool):
        self.server_port, self.certs, self.tls = server_port, certs, tls
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Pooler":
        self.user = server_user()
        self.directory = Path(tempfile.mkdtemp(prefix="pqcancel-pooler-"))
        try:
            self._install("ca.crt", self.certs.ca.read_bytes())
            self._install("server.crt", self.certs.server.cert.read_bytes())
            self._install("server.key", self.certs.server.key.read_bytes())
            self._install("users", f'"{self.superuser}" ""\n'.encode())
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()
        shutil.rmtree(self.directory)

    def conninfo(self, **options) -> str:
        return conninfo(**{"host": self.host, "port": self.port, "user": self.superuser, "dbname": "postgres", **options})

    def _start(self) -> None:
        """Starts on a free port, which is kept free for it."""
        with reserved_port([self.host]) as self.port:
            self._install("pgbouncer.ini", self._settings().encode())
            self.process = self._run()
            wait_until(lambda: self._is_up() or self.process.poll() is not None)
        if not self._is_up():
            raise RuntimeError(f"pgbouncer does not start:\n{self.log.read_text()}")

    def _run(self) -> subprocess.Popen:
        identity = {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []} if self.user else {}
        with self.log.open("ab") as log:
            return subprocess.Popen([PGBOUNCER, self.directory / "pgbouncer.ini"], stdin=subprocess.DEVNULL, stdout=log,
                                    stderr=log, cwd="/", env={"HOME": os.devnull, "LC_ALL": "C"}, **identity)

    def _settings(self) -> str:
        settings = {"listen_addr": self.host, "listen_port": self.port, "unix_socket_dir": "", "auth_type": "trust",
                    "auth_file": self.directory / "users", "client_tls_sslmode": "require" if self.tls else "disable",
                    "client_tls_cert_file": self.directory / "server.crt",
                    "client_tls_key_file": self.directory / "server.key", "server_tls_sslmode": "verify-full",
                    "server_tls_ca_file": self.directory / "ca.crt"}
        return (f"[databases]\n* = host={self.host} port={self.server_port}\n[pgbouncer]\n"
                + "".join(f"{name} = {value}\n" for name, value in settings.items()))

    def _is_up(self) -> bool:
        """Written when it listens, and not before."""
        return "process up:" in self.log.read_text()

    @property
    def log(self) -> Path:
        return self.directory / "log"

    def _install(self, name: str, content: bytes) -> None:
        """Writes a file that pgbouncer's user may read, and nobody else."""
        path = self.directory / name
        path.write_bytes(content)
        path.chmod(0o600)
        if self.user:
            for owned in (self.directory, path):
                os.chown(owned, self.user.pw_uid, self.user.pw_gid)
