"""pqcancel against libpq 18: certificates, sslmodes, and every option that says how a cancel connection is secured."""

from __future__ import annotations

import os
import pty
import shutil
from functools import partial
from pathlib import Path

import pytest

import scripts
from certs import PASSPHRASE, Certs
from comparison import Scenario, cases, compare
from scripts import close, tls_context

OK = "-> OK  status=OK"
FAILED = "status=BAD"


# Server certificates: the session saw the real server's, the cancel connection meets another one.

def shows_certificate(name, start="tls"):
    """A script: a good TLS server, but for its certificate."""
    return lambda c: scripts.after_tls_cancel_request(start, tls_context(c, getattr(c, name)), close, close_notify=True)


def meets(name, shows, transport="tls15", *, label="", **options):
    host = options.get("host", "localhost")
    return Scenario(f"{name}-as-{host}{label}", transport, options=options, shows=shows, script=shows_certificate(name))


MISMATCH = 'server certificate for "{}" does not match host name "{}"'
NOT_VERIFIED = "certificate verify failed"
ANY_PEER = {"sslmode": "require", "sslrootcert": "{dir}/missing"}

CERTIFICATES = [
    meets("server", OK),
    meets("other_server", NOT_VERIFIED),
    meets("expired", NOT_VERIFIED),
    meets("wrong_name", MISMATCH.format("elsewhere.example", "localhost")),
    meets("cn_only", OK),
    meets("cn_only", MISMATCH.format("localhost", "a.pqcancel.test"), host="a.pqcancel.test"),
    meets("wildcard", OK, host="a.pqcancel.test"),
    meets("wildcard", OK, host="A.PQCANCEL.Test"),
    meets("wildcard", MISMATCH.format("*.pqcancel.test", "localhost")),
    meets("multi_san", OK),
    meets("multi_san", OK, host="LocalHost"),
    meets("multi_san_wrong", "(and 2 other names)"),
    meets("ip_in_cn", OK, host="127.0.0.1"),
    meets("ip_in_cn", MISMATCH.format("127.0.0.1", "localhost")),
    meets("other_ip", MISMATCH.format("192.0.2.1", "127.0.0.1"), host="127.0.0.1"),
    meets("server", OK, host="127.0.0.1"),
    meets("server", OK, transport="tls6", host="::1"),
    meets("other_ip", FAILED, transport="tls6", host="::1"),
    meets("revoked", OK),
    meets("revoked", NOT_VERIFIED, label="-crl", sslcrl="{c.crl}"),
    meets("revoked", NOT_VERIFIED, label="-crldir", sslcrldir="{c.crl_dir}"),
    meets("revoked", NOT_VERIFIED, label="-crl-and-crldir", sslcrl="{c.crl}", sslcrldir="{c.crl_dir}"),
    meets("server", OK, label="-crl", sslcrl="{c.crl}"),
    meets("server", OK, label="-crldir", sslcrldir="{c.crl_dir}"),
    meets("revoked", OK, label="-missing-crl", sslcrl="{dir}/missing"),
    # verify-ca does not look at names, require without a root certificate at nothing.
    meets("wrong_name", OK, label="-verify-ca", sslmode="verify-ca"),
    meets("other_server", NOT_VERIFIED, label="-verify-ca", sslmode="verify-ca"),
    meets("other_server", OK, label="-require", **ANY_PEER),
    meets("expired", OK, label="-require", **ANY_PEER),
    # require with a root certificate verifies it, for libpq's old users' sake.
    meets("other_server", NOT_VERIFIED, label="-require-with-root", sslmode="require"),
    meets("wrong_name", OK, label="-require-with-root", sslmode="require"),
    Scenario("tls-fails-prefer", "tls15", options={"sslmode": "prefer"}, script=lambda c: fails_then_listens(c)),
]


def fails_then_listens(certs):
    """A certificate from the wrong CA on the first connection; a server without TLS on what may follow."""
    over_tls = shows_certificate("other_server")(certs)

    def script(connection):
        if connection.number == 1:
            over_tls(connection)
        else:
            connection.receive_packet()
    return script


# sslmodes against the real server.

MODES = [Scenario(f"sslmode-{mode}", transport, run, options={"sslmode": mode}, shows="session: ssl=1")
         for transport in ("tls15", "tls18") for mode in ("prefer", "require", "verify-ca", "verify-full")
         for run in ("polled", "blocking")]
MODES += [Scenario(f"sslmode-{mode}-no-root", "tls15", options={"sslmode": mode, "sslrootcert": None}, shows=OK)
          for mode in ("prefer", "require")]
MODES += [
    Scenario("sslmode-allow", "tls15", run, options={"sslmode": "allow", "dbname": "tls_only"}, sessions=2, shows="ssl=1")
    for run in ("polled", "blocking")
]
MODES += [
    # These sessions are in the clear, though they would have taken TLS.
    Scenario("plain-session-prefer", "tcp4", run, options={"sslmode": "prefer", "dbname": "plain_only"}, sessions=2,
             shows="ssl=0") for run in ("polled", "blocking")
]
MODES += [
    Scenario("plain-session-allow", "tcp4", options={"sslmode": "allow"}, shows="ssl=0"),
    Scenario("sslmode-on-unix", "unix", options={"sslmode": "require"}, shows="ssl=0"),
    Scenario("sslmode-on-abstract", "abstract", options={"sslmode": "prefer"}, shows="ssl=0"),
    Scenario("sslnegotiation-postgres", "tls18", options={"sslnegotiation": "postgres"}, shows="wire 1: SSLRequest"),
    Scenario("sslnegotiation-direct-require", "direct18", options={"sslmode": "require"}, shows="wire 1: ClientHello"),
    Scenario("environment", "tcp4", options={"sslmode": None, "host": "localhost", "hostaddr": "127.0.0.1"}, shows="ssl=1",
             environment={"PGSSLMODE": "verify-full", "PGSSLROOTCERT": "{c.ca}"}),
]


# Files: where they are looked for, what may be wrong with them, and what becomes of a cancel when they change.

def dot_postgresql(directory: Path, certs: Certs, *, crl: Path | None = None, client: bool = False) -> None:
    """libpq's default files below $HOME."""
    place = directory / ".postgresql"
    place.mkdir()
    shutil.copy(certs.ca, place / "root.crt")
    if crl:
        shutil.copy(crl, place / "root.crl")
    if client:
        shutil.copy(certs.client.cert, place / "postgresql.crt")
        shutil.copy(certs.client.key, place / "postgresql.key")


def put(directory: Path, certs: Certs, **files) -> None:
    """put(root_crt="ca") copies certs.ca to {dir}/root.crt; "client.key" means the key of certs.client."""
    for name, source in files.items():
        value = certs
        for part in source.split("."):
            value = getattr(value, part)
        shutil.copy(value, directory / name.replace("_", "."))


def write(directory: Path, _certs: Certs, name: str, text: str) -> None:
    (directory / name).write_text(text)


def remove(directory: Path, _certs: Certs, name: str) -> None:
    (directory / name).unlink()


def mode(directory: Path, _certs: Certs, name: str, bits: int) -> None:
    (directory / name).chmod(bits)


ROOT = {"sslrootcert": "{dir}/root.crt"}
DEFAULT_ROOT = {"sslrootcert": None}
with_root = partial(put, root_crt="ca")


def default_root_replaced(directory: Path, certs: Certs) -> None:
    shutil.copy(certs.other_ca, directory / ".postgresql" / "root.crt")


ROOTS = [
    Scenario("root-given", "tls15", options=ROOT, prepare=with_root, shows=OK),
    Scenario("root-gone", "tls15", options=ROOT, prepare=with_root, at_session=partial(remove, name="root.crt"),
             shows='root.crt" does not exist'),
    Scenario("root-gone-require", "tls15", options={**ROOT, "sslmode": "require"}, prepare=with_root,
             at_session=partial(remove, name="root.crt"), shows=OK),
    Scenario("root-replaced", "tls15", options=ROOT, prepare=with_root, at_session=partial(put, root_crt="other_ca"),
             shows=NOT_VERIFIED),
    Scenario("root-garbage", "tls15", options=ROOT, prepare=with_root,
             at_session=partial(write, name="root.crt", text="garbage\n"), shows="could not read root certificate file"),
    Scenario("root-empty", "tls15", options=ROOT, prepare=with_root, at_session=partial(write, name="root.crt", text=""),
             shows="could not read root certificate file"),
    Scenario("default-root", "tls15", options=DEFAULT_ROOT, prepare=dot_postgresql, shows=OK),
    Scenario("default-root-gone", "tls15", options=DEFAULT_ROOT, prepare=dot_postgresql,
             at_session=partial(remove, name=".postgresql/root.crt"), shows='root.crt" does not exist'),
    Scenario("default-root-replaced", "tls15", options={**DEFAULT_ROOT, "sslmode": "require"}, prepare=dot_postgresql,
             at_session=default_root_replaced, shows=NOT_VERIFIED),
    Scenario("default-root-appears", "tls15", options={**DEFAULT_ROOT, "sslmode": "require"},
             prepare=lambda d, c: (d / ".postgresql").mkdir(), at_session=default_root_replaced, shows=NOT_VERIFIED),
    Scenario("default-crl", "tls15", options=DEFAULT_ROOT, prepare=lambda d, c: dot_postgresql(d, c, crl=c.crl),
             script=shows_certificate("revoked"), shows=NOT_VERIFIED),
    Scenario("default-crl-unused", "tls15", prepare=lambda d, c: dot_postgresql(d, c, crl=c.crl),
             script=shows_certificate("revoked"), shows=""),
    Scenario("crl-of-another-ca", "tls15", options={"sslcrl": "{dir}/list"},
             prepare=lambda d, c: shutil.copy(c.crl, d / "list"), at_session=lambda d, c: shutil.copy(c.other_crl, d / "list"),
             shows=NOT_VERIFIED),
    Scenario("crl-garbage", "tls15", options={"sslcrl": "{dir}/list"}, prepare=lambda d, c: shutil.copy(c.crl, d / "list"),
             at_session=partial(write, name="list", text="garbage\n"), shows=""),
    Scenario("system-root", "tls18", options={"sslrootcert": "system"}, environment={"SSL_CERT_FILE": "{c.ca}"}, shows=OK),
    Scenario("system-root-replaced", "tls18", options={"sslrootcert": "system"}, prepare=with_root,
             environment={"SSL_CERT_FILE": "{dir}/root.crt", "SSL_CERT_DIR": "{dir}/none"},
             at_session=partial(put, root_crt="other_ca"), shows=NOT_VERIFIED),
]

# The client's certificate. The server asks for one, so the wire shows which one came.
CLIENT = {"sslcert": "{dir}/client.crt", "sslkey": "{dir}/client.key"}
with_client = partial(put, client_crt="client.cert", client_key="client.key")


def client(name, shows, *, at_session=None, prepare=with_client, transport="tls15", script=True, **options):
    return Scenario(f"client-{name}", transport, options={**CLIENT, **options}, prepare=prepare, at_session=at_session,
                    shows=shows, script=shows_certificate("server") if script else None)


def default_client(name, shows, at_session=None):
    return Scenario(f"default-client-{name}", "tls15", prepare=lambda d, c: dot_postgresql(d, c, client=True),
                    at_session=at_session, shows=shows, script=shows_certificate("server"))


SHOWN = "client certificate "
CLIENTS = [
    client("given", SHOWN),
    client("given-to-real-server", OK, script=False),
    client("rsa", SHOWN, prepare=partial(put, client_crt="client_rsa.cert", client_key="client_rsa.key")),
    client("key-der", SHOWN, prepare=partial(put, client_crt="client.cert", client_key="client_der.key")),
    client("key-encrypted", SHOWN, prepare=partial(put, client_crt="client.cert", client_key="client_encrypted.key"),
           sslpassword=PASSPHRASE),
    client("key-encrypted-wrong-password", "could not load private key file", sslpassword="wrong",
           at_session=partial(put, client_key="client_encrypted.key")),
    client("key-encrypted-no-password", FAILED, at_session=partial(put, client_key="client_encrypted.key")),
    client("key-readable", "has group or world access", at_session=partial(mode, name="client.key", bits=0o644)),
    client("key-group-readable", "", at_session=partial(mode, name="client.key", bits=0o640)),
    client("key-gone", "certificate present, but not private key file", at_session=partial(remove, name="client.key")),
    client("key-wrong", "key values mismatch",
           at_session=partial(put, client_key="client_wrong_key.key")),
    client("key-wrong-type", FAILED, at_session=partial(put, client_key="client_wrong_type.key")),
    client("key-garbage", "could not load private key file",
           at_session=partial(write, name="client.key", text="garbage\n")),
    client("cert-gone", OK, at_session=partial(remove, name="client.crt")),
    client("cert-garbage", "could not read certificate file",
           at_session=partial(write, name="client.crt", text="garbage\n")),
    client("certmode-disable", OK, sslcertmode="disable"),
    client("certmode-allow", SHOWN, sslcertmode="allow"),
    client("certmode-require", SHOWN, sslcertmode="require", transport="tls18"),
    default_client("given", SHOWN),
    default_client("key-gone", "", partial(remove, name=".postgresql/postgresql.key")),
    default_client("cert-gone", OK, partial(remove, name=".postgresql/postgresql.crt")),
    default_client("key-readable", "has group or world access", partial(mode, name=".postgresql/postgresql.key", bits=0o644)),
    Scenario("default-client-other-key", "tls15", options={"sslkey": "{dir}/client.key"}, shows=SHOWN,
             prepare=lambda d, c: (dot_postgresql(d, c, client=True), put(d, c, client_key="client.key"),
                                   remove(d, c, ".postgresql/postgresql.key")), script=shows_certificate("server")),
]


# What the handshake says.

def too_old(c):
    return scripts.after_tls_cancel_request("tls", tls_context(c, c.server, too_old=True), close)


HANDSHAKES = [
    Scenario("max-1.2", "tls15", options={"ssl_max_protocol_version": "TLSv1.2"}, shows="versions="),
    Scenario("max-1.2-direct", "direct18", options={"ssl_max_protocol_version": "TLSv1.2"}, shows="versions="),
    Scenario("max-1.2-cycles", "tls15", "cycles", 20, options={"ssl_max_protocol_version": "TLSv1.2"}, shows="+0"),
    Scenario("min-1.3", "tls15", options={"ssl_min_protocol_version": "TLSv1.3"}, shows="versions=0304)"),
    Scenario("min-1.3-too-old", "tls15", options={"ssl_min_protocol_version": "TLSv1.3"}, shows=FAILED, script=too_old),
    Scenario("min-1-too-old", "tls15", options={"ssl_min_protocol_version": "TLSv1"}, shows="", script=too_old),
    Scenario("sni", "tls15", options={"sslsni": "1"}, shows="sni=localhost"),
    Scenario("sni-off", "tls15", options={"sslsni": "0"}, shows="sni=None"),
    Scenario("sni-case", "tls15", options={"host": "LOCALHOST"}, shows="sni=LOCALHOST"),
    Scenario("sni-trailing-dot", "tls15", options={"host": "localhost.", "sslmode": "verify-ca"}, shows="sni=localhost"),
    Scenario("sni-ip", "tls15", options={"host": "127.0.0.1", "hostaddr": None}, shows="sni=None"),
    Scenario("sni-ip6", "tls6", options={"host": "::1", "hostaddr": None}, shows="sni=None"),
    Scenario("sni-no-host", "tls15", options={"host": None, "sslmode": "verify-ca"}, shows="sni=None"),
    Scenario("alpn", "tls15", shows="alpn=postgresql"),
    Scenario("no-host-verify-full", "tls15", options={"host": "127.0.0.1", "hostaddr": "127.0.0.1"}, shows=OK),
]


def keys_of_two_connections(directory: Path) -> None:
    """The session's secrets and the cancel connection's: each client random stands in several lines of its own."""
    lines = [line.split() for line in (directory / "keys").read_text().splitlines() if not line.startswith("#")]
    assert len({random for _label, random, _secret in lines}) == 2, lines
    assert (directory / "keys").stat().st_mode & 0o077 == 0


HANDSHAKES += [
    Scenario("keylog", "tls18", options={"sslkeylogfile": "{dir}/keys"}, shows=OK, check=keys_of_two_connections),
    Scenario("keylog-impossible", "tls18", options={"sslkeylogfile": "{dir}/none/keys"}, shows=""),
]

SCENARIOS = [*CERTIFICATES, *MODES, *ROOTS, *CLIENTS, *HANDSHAKES]


END = b"\f"
NO_PASSWORD = next(s for s in CLIENTS if s.name == "client-key-encrypted-no-password")


def test_never_prompts(laboratory, tmp_path):
    """With a terminal at hand libpq lets OpenSSL ask it for the key's passphrase, and waits. A library must not."""
    primary, secondary = pty.openpty()
    try:
        outcome = laboratory.over_pqcancel(NO_PASSWORD, tmp_path / "home", "system", terminal=secondary)
        assert outcome.shows("could not load private key file"), outcome.report
        os.write(secondary, END)  # what was written before would come before it
        assert os.read(primary, 1000) == END
    finally:
        os.close(primary)
        os.close(secondary)


@pytest.mark.parametrize("scenario,host", cases(SCENARIOS))
def test_same_as_libpq18(laboratory, tmp_path, scenario, host):
    compare(laboratory, scenario, tmp_path / "home", host)
