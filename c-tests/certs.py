"""Certificates for the tests, made with the openssl command line.

Everything hangs off one root CA, `ca`, except what belongs to `other_ca`. Keys are EC P-256 (fast to make) except the RSA
client pair. See Certs for what is there.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

PASSPHRASE = "open sesame"

# `openssl ca` does the signing because it alone can date a certificate in the past and revoke one.
CA_CONFIG = """
[ca]
default_ca = this
[this]
database = {directory}/{name}.index
new_certs_dir = {directory}
certificate = {directory}/{name}.crt
private_key = {directory}/{name}.key
default_md = sha256
default_days = 30
default_crl_days = 30
rand_serial = yes
unique_subject = no
policy = any
email_in_dn = no
copy_extensions = none
[any]
commonName = supplied
"""


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, both PEM files."""

    cert: Path
    key: Path


@dataclass(frozen=True)
class Certs:
    """All files, by what is particular about them. The server certificates are signed by `ca` unless said otherwise."""

    directory: Path
    ca: Path
    other_ca: Path  # signed none of the certificates below but other_server
    server: Pair  # CN and DNS localhost, DNS *.pqcancel.test, IP 127.0.0.1 and ::1
    other_server: Pair  # the same names, signed by other_ca
    wrong_name: Pair  # DNS elsewhere.example only
    expired: Pair
    revoked: Pair
    cn_only: Pair  # CN localhost, no subjectAltName
    wildcard: Pair  # DNS *.pqcancel.test
    multi_san: Pair  # DNS one.pqcancel.test, two.pqcancel.test and localhost
    multi_san_wrong: Pair  # three DNS names, none of them localhost
    ip_in_cn: Pair  # CN 127.0.0.1, no subjectAltName
    other_ip: Pair  # IP 192.0.2.1 only
    crl: Path  # of ca, lists `revoked`
    crl_dir: Path  # the same, under its hash
    other_crl: Path  # of other_ca, empty: no CRL for what ca signed
    client: Pair
    client_rsa: Pair
    client_encrypted: Pair  # the key of `client` behind PASSPHRASE
    client_der: Pair  # the key in DER
    client_readable: Pair  # the key with mode 0644
    client_wrong_key: Pair  # the key of another EC certificate
    client_wrong_type: Pair  # the key of the RSA certificate


def make(directory: Path | str) -> Certs:
    """Makes all certificates in directory, which is created if need be."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    ca = _Authority(directory, "ca", "pqcancel test root")
    other_ca = _Authority(directory, "other_ca", "pqcancel other root")
    local = "DNS:localhost,DNS:*.pqcancel.test,IP:127.0.0.1,IP:::1"
    revoked = ca.sign("revoked", "localhost", local)
    ca.revoke(revoked)
    client = ca.sign("client", "postgres")
    client_rsa = ca.sign("client_rsa", "postgres", algorithm="rsa:2048")
    return Certs(
        directory=directory,
        ca=ca.cert,
        other_ca=other_ca.cert,
        server=ca.sign("server", "localhost", local),
        other_server=other_ca.sign("other_server", "localhost", local),
        wrong_name=ca.sign("wrong_name", "elsewhere.example", "DNS:elsewhere.example"),
        expired=ca.sign("expired", "localhost", local, ["-startdate", "20200101000000Z", "-enddate", "20200201000000Z"]),
        revoked=revoked,
        cn_only=ca.sign("cn_only", "localhost"),
        wildcard=ca.sign("wildcard", "wildcard", "DNS:*.pqcancel.test"),
        multi_san=ca.sign("multi_san", "multi", "DNS:one.pqcancel.test,DNS:two.pqcancel.test,DNS:localhost"),
        multi_san_wrong=ca.sign("multi_san_wrong", "multi",
                                "DNS:one.pqcancel.test,DNS:two.pqcancel.test,DNS:three.pqcancel.test"),
        ip_in_cn=ca.sign("ip_in_cn", "127.0.0.1"),
        other_ip=ca.sign("other_ip", "other ip", "IP:192.0.2.1"),
        crl=ca.crl(),
        crl_dir=ca.crl_dir(),
        other_crl=other_ca.crl(),
        client=client,
        client_rsa=client_rsa,
        client_encrypted=Pair(client.cert, _converted(client.key, "client_encrypted.key", "-aes256", "-passout",
                                                      f"pass:{PASSPHRASE}")),
        client_der=Pair(client.cert, _converted(client.key, "client_der.key", "-outform", "DER")),
        client_readable=Pair(client.cert, _converted(client.key, "client_readable.key", mode=0o644)),
        client_wrong_key=Pair(client.cert, ca.sign("client_other", "postgres").key),
        client_wrong_type=Pair(client.cert, client_rsa.key),
    )


class _Authority:
    """A self-signed root CA that signs, revokes and lists what it revoked."""

    def __init__(self, directory: Path, name: str, subject: str):
        self.directory, self.name = directory, name
        self.cert = directory / f"{name}.crt"
        self.config = directory / f"{name}.cnf"
        self.config.write_text(CA_CONFIG.format(directory=directory, name=name))
        (directory / f"{name}.index").write_text("")
        _openssl("req", "-x509", *_new_key("ec", directory / f"{name}.key"), "-days", "30", "-subj", f"/CN={subject}",
                 "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
                 "-out", self.cert)

    def sign(self, name: str, subject: str, san: str = "", dates: list[str] | None = None, algorithm: str = "ec") -> Pair:
        pair = Pair(self.directory / f"{name}.crt", self.directory / f"{name}.key")
        request, extensions = self.directory / f"{name}.csr", self.directory / f"{name}.ext"
        extensions.write_text("basicConstraints=CA:FALSE\n" + (f"subjectAltName={san}\n" if san else ""))
        _openssl("req", "-new", *_new_key(algorithm, pair.key), "-subj", f"/CN={subject}", "-out", request)
        _openssl("ca", "-batch", "-notext", "-config", self.config, "-extfile", extensions, "-in", request,
                 *(dates or []), "-out", pair.cert)
        pair.key.chmod(0o600)
        return pair

    def revoke(self, pair: Pair) -> None:
        _openssl("ca", "-config", self.config, "-revoke", pair.cert)

    def crl(self) -> Path:
        path = self.directory / f"{self.name}.crl"
        _openssl("ca", "-config", self.config, "-gencrl", "-out", path)
        return path

    def crl_dir(self) -> Path:
        path = self.directory / f"{self.name}.crl.d"
        path.mkdir(exist_ok=True)
        digest = _openssl("crl", "-in", self.directory / f"{self.name}.crl", "-noout", "-hash").strip()
        (path / f"{digest}.r0").write_bytes((self.directory / f"{self.name}.crl").read_bytes())
        return path


def _new_key(algorithm: str, path: Path) -> list[str]:
    curve = ["-pkeyopt", "ec_paramgen_curve:P-256"] if algorithm == "ec" else []
    return ["-newkey", algorithm, *curve, "-nodes", "-keyout", str(path)]


def _converted(key: Path, name: str, *options: str, mode: int = 0o600) -> Path:
    path = key.with_name(name)
    _openssl("pkey", "-in", key, *options, "-out", path)
    path.chmod(mode)
    return path


def _openssl(*arguments) -> str:
    # Whatever the machine's openssl.cnf says shall not matter to the tests.
    environment = {**os.environ, "OPENSSL_CONF": os.devnull}
    result = subprocess.run(["openssl", *map(str, arguments)], env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]} failed: {result.stderr}")
    return result.stdout
