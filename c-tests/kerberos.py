"""A private Kerberos realm for the tests: a KDC on a free port, service keys for PostgreSQL, and tickets for a user.

Everything stands in one temporary directory, and nothing of the machine's own Kerberos (/etc/krb5.conf, the user's
tickets, DNS) has a say. Needs krb5-kdc, krb5-admin-server and krb5-user.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from monitor import wait_until
from server import reserved_port, server_user

# Where Debian puts the KDC's programs; not in everybody's PATH.
PROGRAMS = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])
HOST = "127.0.0.1"
DEADLINE = 120  # seconds for the KDC to come up, and for each tool

# TCP only, on both sides: one port to find, and no retries of lost datagrams. No replay cache, which would be left
# behind below /var/tmp.
KRB5_CONF = """
[libdefaults]
    default_realm = {realm}
    dns_lookup_realm = false
    dns_lookup_kdc = false
    dns_canonicalize_hostname = false
    dns_uri_lookup = false
    rdns = false
    udp_preference_limit = 1
    default_rcache_name = none:
[realms]
    {realm} = {{
        kdc = {host}:{port}
    }}
[domain_realm]
    localhost = {realm}
"""
KDC_CONF = """
[kdcdefaults]
    kdc_listen = ""
    kdc_tcp_listen = {host}:{port}
[realms]
    {realm} = {{
        database_name = {directory}/principal
        key_stash_file = {directory}/stash
        acl_file = {directory}/acl
        supported_enctypes = {enctype}:normal
    }}
[logging]
    default = FILE:{directory}/log
"""


class Realm:
    """A running KDC, for use in a `with` statement.

    environment is what a client needs to show the user's ticket, server_environment what PostgreSQL needs beside
    krb_server_keyfile = keytab, and acceptor_environment what a server of the tests needs that is none.
    """

    name = "PQCANCEL.TEST"
    enctype = "aes256-cts-hmac-sha1-96"  # one only, so that the sizes on the wire are known
    user = "postgres"
    service = "postgres/localhost"
    # Also for clients that know the host by its address, or the service by another name (krbsrvname).
    services = (service, "postgres/127.0.0.1", "other/localhost")

    def __enter__(self) -> "Realm":
        self.directory = Path(tempfile.mkdtemp(prefix="pqcancel-krb5-"))
        self.kdc: subprocess.Popen | None = None
        self.stack = ExitStack()
        try:
            self.port = self.stack.enter_context(reserved_port([HOST]))  # also while there is no KDC
            self.directory.chmod(0o755)  # the server's user reads krb5.conf and the keytab
            self._write_files()
            self._create()
            self.start()
            self.kinit(self.tickets)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exception) -> None:
        self.stop()
        self.stack.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def keytab(self) -> Path:
        return self.directory / "server.keytab"

    @property
    def user_keytab(self) -> Path:
        """With this, GSSAPI fetches tickets by itself."""
        return self.directory / "user.keytab"

    @property
    def tickets(self) -> Path:
        return self.directory / "tickets"

    @property
    def server_environment(self) -> dict[str, str]:
        return {"KRB5_CONFIG": str(self.directory / "krb5.conf")}

    @property
    def environment(self) -> dict[str, str]:
        return {**self.server_environment, "KRB5CCNAME": f"FILE:{self.tickets}"}

    @property
    def acceptor_environment(self) -> dict[str, str]:
        return {**self.server_environment, "KRB5_KTNAME": f"FILE:{self.keytab}"}

    def kinit(self, tickets: Path, *options: str) -> None:
        """Fills a file with a ticket for tickets, forwardable."""
        self._admin_tool("kinit", "-k", "-t", self.user_keytab, "-f", "-c", tickets, *options, self.user)

    def expire(self, tickets: Path) -> None:
        """Fills a file with a ticket for tickets, and waits until there is none to be had for it any more."""
        self.kinit(tickets, "-l", "1s")
        command = [_program("kvno"), "-q", "--no-store", "-c", str(tickets), self.service]
        wait_until(lambda: subprocess.run(command, env=self._admin_environment(), stdout=subprocess.DEVNULL,
                                          stderr=subprocess.DEVNULL, timeout=DEADLINE).returncode != 0)

    def kdestroy(self, tickets: Path) -> None:
        self._admin_tool("kdestroy", "-c", tickets)

    def rename(self, service: str, name: str) -> None:
        """The KDC knows a service by another name only. Its key stays the same."""
        self._admin_tool("kadmin.local", "rename_principal", "-force", service, name)

    def _write_files(self) -> None:
        values = {"realm": self.name, "host": HOST, "port": self.port, "directory": self.directory, "enctype": self.enctype}
        (self.directory / "krb5.conf").write_text(KRB5_CONF.format(**values))
        (self.directory / "kdc.conf").write_text(KDC_CONF.format(**values))

    def _create(self) -> None:
        """The database and the principals; all keys are random, so there is no password anywhere."""
        self._admin_tool("kdb5_util", "create", "-s", "-r", self.name, "-P", os.urandom(16).hex())
        for principal, keytab in ((self.user, self.user_keytab), *((service, self.keytab) for service in self.services)):
            self._admin_tool("kadmin.local", "addprinc", "-randkey", principal)
            self._admin_tool("kadmin.local", "ktadd", "-k", keytab, principal)
        user = server_user()
        if user:
            os.chown(self.keytab, user.pw_uid, user.pw_gid)

    def start(self) -> None:
        """If it does not run already."""
        if self.kdc:
            return
        self.kdc = subprocess.Popen([_program("krb5kdc"), "-n"], env=self._admin_environment(), cwd="/",
                                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        said = self._startup_message()
        if b"starting" not in said:  # said when it listens
            self.stop()
            raise RuntimeError(f"the KDC does not start: {said.decode(errors='replace')}\n{(self.directory / 'log').read_text()}")

    def _startup_message(self) -> bytes:
        """What the KDC said until it was up, ended or used up its time."""
        said, end = b"", time.monotonic() + DEADLINE
        while b"starting" not in said:
            readable, _, _ = select.select([self.kdc.stderr], [], [], max(0, end - time.monotonic()))
            more = os.read(self.kdc.stderr.fileno(), 4096) if readable else b""
            if not more:
                break
            said += more
        return said

    def stop(self) -> None:
        """Nobody hands out tickets any more, until the next start()."""
        if self.kdc:
            self.kdc.kill()
            self.kdc.wait()
            self.kdc.stderr.close()
            self.kdc = None

    def _admin_environment(self) -> dict[str, str]:
        """Without KRB5* variables of the caller."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KRB5")}
        return {**environment, **self.environment, "KRB5_KDC_PROFILE": str(self.directory / "kdc.conf"), "LC_ALL": "C"}

    def _admin_tool(self, program: str, *arguments) -> None:
        result = subprocess.run([_program(program), *map(str, arguments)], env=self._admin_environment(), cwd="/",
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                timeout=DEADLINE)
        if result.returncode != 0:
            raise RuntimeError(f"{program} {' '.join(map(str, arguments))} failed:\n{result.stdout}")


def _program(name: str) -> str:
    found = shutil.which(name, path=PROGRAMS)
    if not found:
        raise RuntimeError(f"{name} is not there: apt-get install krb5-kdc krb5-admin-server krb5-user")
    return found
