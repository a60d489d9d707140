"""The packages that `make deb` and `make rpm` make: what is in them, and, in a copy of this machine, that they are installed,
used as a developer and an administrator would, and removed without a trace.

PQCANCEL_PACKAGES names the directory with both.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import installation
from eavesdropper import Cancels
from installation import BY_NEW, BY_OLD, MULTIARCH
from library import LIBRARY
from test_library import MAY_NEED

pytestmark = pytest.mark.packages

PACKAGES = Path(os.environ.get("PQCANCEL_PACKAGES", LIBRARY.parent / "package")).absolute()

# What lintian has to say of a single package that is not Debian's own.
KNOWN_TO_LINTIAN = {"bogus-mail-host", "bogus-mail-host-in-debian-changelog", "initial-upload-closes-no-bugs",
                    "link-to-shared-library-in-wrong-package", "package-name-doesnt-match-sonames"}


def package(pattern: str) -> Path:
    [found] = PACKAGES.glob(pattern)
    return found


@pytest.fixture(scope="module")
def deb() -> Path:
    return package("pqcancel_*.deb")


@pytest.fixture(scope="module")
def rpm() -> Path:
    return package("pqcancel-*.rpm")


def output(*words: object) -> str:
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout


def is_link(mode: str) -> bool:
    return not re.fullmatch(r"[-d][-rwx]{9}", mode)


# The Debian package.

@pytest.fixture(scope="module")
def deb_files() -> dict[str, str]:
    return installation.files(f"lib/{MULTIARCH}", compressed=".gz")


DEB_DOCUMENTS = {f"share/doc/pqcancel/{name}" for name in ("README.md", "changelog.Debian.gz", "changelog.gz", "copyright")}


def test_what_is_in_the_deb(deb, deb_files):
    listed = {}
    for line in output("dpkg-deb", "--contents", deb).splitlines():
        mode, owner, _, _, _, path = line.split(maxsplit=5)
        assert owner == "root/root"
        path, _, target = path.partition(" -> ")
        listed[path.removeprefix("./usr/").removesuffix("/")] = target or mode
    files = {path: mode for path, mode in listed.items() if not mode.startswith("d")}
    # As Debian has it: a library is not executable.
    libraries = [path for path, mode in deb_files.items() if ".so." in path and not is_link(mode)]
    assert files == {**deb_files, **dict.fromkeys([*libraries, *DEB_DOCUMENTS], "-rw-r--r--")}


def test_what_the_deb_says_of_itself(deb, tmp_path):
    fields = dict(re.findall(r"^(\S+): (.*)$", output("dpkg-deb", "--field", deb), re.MULTILINE))
    assert fields["Package"] == "pqcancel"
    assert re.search(r"\blibc6 \(>= 2\.\d+\)", fields["Depends"]) and re.search(r"\blibpq5\b", fields["Depends"])
    assert "ssl" not in fields["Depends"]
    output("dpkg-deb", "--control", deb, tmp_path)
    # No script runs as root when it is installed: the loader's cache is renewed by its own trigger.
    assert {path.name for path in tmp_path.iterdir()} == {"control", "md5sums", "shlibs", "triggers"}
    assert (tmp_path / "triggers").read_text() == "activate-noawait ldconfig\n"


@pytest.mark.skipif(not shutil.which("lintian"), reason="lintian is not here")
def test_lintian_has_nothing_new_to_say(deb):
    said = subprocess.run(["lintian", "--allow-root", deb], capture_output=True, text=True).stdout
    assert set(re.findall(r"^[EW]: pqcancel: (\S+)", said, re.MULTILINE)) <= KNOWN_TO_LINTIAN, said


def test_the_deb_is_installed_used_and_removed(deb, deb_files, machine, monitor, eavesdropper, tmp_path):
    before = machine.changes()
    machine.run("dpkg", "--install", deb)
    assert machine.run("dpkg", "--verify", "pqcancel") == ""
    assert "libpqcancel.so.1 " in machine.run("ldconfig", "--print-cache")
    assert machine.changes() >= {f"/usr/{path}" for path in {*deb_files, *DEB_DOCUMENTS}}

    program = installation.compile_in(machine, tmp_path, "pqcancel")
    assert installation.cancelled(monitor, eavesdropper, *machine.command(program)) == BY_NEW
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=1)
    (tmp_path / "debian").mkdir()
    (tmp_path / "debian" / "control").touch()
    depends = machine.run("sh", "-c", f"cd {tmp_path} && dpkg-shlibdeps -O {program} 2>&1")
    assert re.search(r"^shlibs:Depends=.*\bpqcancel\b", depends, re.MULTILINE), depends

    old = installation.compile_in(machine, tmp_path, "libpq")
    assert installation.cancelled(monitor, eavesdropper, *machine.command("pqcancel", old)) == BY_OLD
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=2)
    assert machine.run("pqcancel", "psql", "--version").startswith("psql (PostgreSQL) ")
    path = machine.run("pqcancel", "--dlopen", "printenv", "LD_LIBRARY_PATH")
    assert path == f"/usr/lib/{MULTIARCH}/pqcancel/dlopen\n"
    assert installation.cancelled(monitor, eavesdropper, *machine.command(old)) == BY_OLD
    assert eavesdropper.cancels == Cancels(readable=1, encrypted=2), "the control experiment"

    machine.run("dpkg", "--purge", "pqcancel")
    assert machine.changes() - before == set()
    assert "pqcancel" not in machine.run("ldconfig", "--print-cache")


# The package for Red Hat and its like, as far as a Debian can tell.

@pytest.fixture(scope="module")
def rpm_files() -> dict[str, str]:
    return installation.files("lib64", compressed=".gz")


RPM_DOCUMENTS = {"share/doc/pqcancel/README.md", "share/doc/pqcancel/CHANGELOG.md", "share/licenses/pqcancel/LICENSE"}


def test_what_is_in_the_rpm(rpm, rpm_files):
    """Without its links, which it makes when it is installed."""
    listed = output("rpm", "--query", "--package", "--queryformat", r"[%{FILEMODES:perms} %{FILEUSERNAME} %{FILENAMES}\n]", rpm)
    files = {}
    for line in listed.splitlines():
        mode, owner, path = line.split()
        assert owner == "root"
        files[path.removeprefix("/usr/")] = mode
    expected = {path: mode for path, mode in rpm_files.items() if not is_link(mode)}
    assert files == {**expected, **dict.fromkeys(RPM_DOCUMENTS, "-rw-r--r--")}


def test_what_the_rpm_says_of_itself(rpm):
    requires = set(output("rpm", "--query", "--package", "--requires", rpm).splitlines())
    libraries = {word.partition("(")[0] for word in requires if ".so" in word}
    assert libraries - {*MAY_NEED, "libgcc_s.so.1"} == {"libpq.so.5"}
    assert any(re.fullmatch(r"libc\.so\.6\(GLIBC_2\.\d+\)\(64bit\)", word) for word in requires), requires
    provides = output("rpm", "--query", "--package", "--provides", rpm).splitlines()
    assert "libpqcancel.so.1()(64bit)" in provides


def test_the_rpm_is_installed_used_and_removed(rpm, rpm_files, machine, monitor, eavesdropper, tmp_path):
    for directory in ("lib64/pkgconfig", "lib64/cmake", "share/licenses"):  # which belong to another package there
        machine.run("mkdir", "--parents", f"/usr/{directory}")
    before = machine.changes()
    # This is no Red Hat: what it requires is there, but no package of rpm's provides it.
    machine.run("rpm", "--install", "--nodeps", "--force-debian", rpm)
    assert machine.changes() >= {f"/usr/{path}" for path in {*rpm_files, *RPM_DOCUMENTS}}
    for path, target in rpm_files.items():
        if is_link(target):
            assert machine.run("readlink", f"/usr/{path}") == f"{target}\n"

    program = installation.compile_in(machine, tmp_path, "pqcancel", PKG_CONFIG_PATH="/usr/lib64/pkgconfig")
    run = machine.command("env", "LD_LIBRARY_PATH=/usr/lib64", program)
    assert installation.cancelled(monitor, eavesdropper, *run) == BY_NEW
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=1)
    assert machine.run("pqcancel", "--version").endswith(" (library: /usr/lib64/libpqcancel.so.1)\n")
    assert machine.run("pqcancel", "--dlopen", "printenv", "LD_LIBRARY_PATH") == "/usr/lib64/pqcancel/dlopen\n"

    machine.run("rpm", "--erase", "--force-debian", "pqcancel")
    assert machine.changes() - before == set()
