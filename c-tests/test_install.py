"""`make install` and `make uninstall`: what is there afterwards, and that a developer needs no more than that.

All of it is installed into directories of the tests. What is compiled here is compiled and linked by pkg-config or CMake
alone, and cancels a query of a session over TLS.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bindings
import installation
import peers
import programs
from eavesdropper import Cancels
from installation import BY_NEW, BY_OLD, MULTIARCH, make, tree
from library import LIBRARY, has_private_openssl
from test_library import EXPORTS
from test_wrapper import manual

ENCRYPTED, READABLE = Cancels(readable=0, encrypted=1), Cancels(readable=1, encrypted=0)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("installed")
    installed = make("install", PREFIX=directory)
    assert (installed.returncode, installed.stdout, installed.stderr) == (0, "", "")
    return directory


def pkg_config(prefix: Path, *options: str) -> list[str]:
    command = ["pkg-config", *options]
    environment = {"PATH": os.defpath, "PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()


# What is there, and what is left.

def test_everything_is_there_with_its_rights(prefix):
    there = {path: mode for path, mode in tree(prefix).items() if not mode.startswith("d")}
    assert there.pop("lib/pqcancel/directories") == "-rw-r--r--"
    assert there == installation.files("lib")
    assert {mode for mode in tree(prefix).values() if mode.startswith("d")} == {"drwxr-xr-x"}


def test_the_links_bear_the_soname(prefix):
    dynamic = subprocess.run(["readelf", "--dynamic", prefix / "lib" / "libpqcancel.so"], check=True, capture_output=True,
                             text=True).stdout
    assert re.findall(r"\(SONAME\).*\[(.*)\]", dynamic) == [os.readlink(prefix / "lib" / "libpqcancel.so")]


WHERE = {
    "default": {"PREFIX": "{root}/opt"},
    "prefix": {"PREFIX": "{root}/opt/pqcancel"},
    "each": {"PREFIX": "{root}/opt", "LIBDIR": "{root}/opt/lib64", "INCLUDEDIR": "{root}/headers", "MANDIR": "{root}/man"},
    "staged": {"DESTDIR": "{root}", "PREFIX": "/usr"},
    "staged-multiarch": {"DESTDIR": "{root}", "PREFIX": "/usr", "LIBDIR": f"/usr/lib/{MULTIARCH}"},
}


@pytest.mark.parametrize("where", WHERE)
def test_uninstall_leaves_nothing(tmp_path, where):
    """Also of what was installed twice. Nor does it take anything away: directories that were there before stay, empty ones
    too, unless the tree is staged."""
    variables = {name: value.format(root=tmp_path) for name, value in WHERE[where].items()}
    staged = "DESTDIR" in variables
    (tmp_path / "opt" / "lib" / "pkgconfig").mkdir(parents=True)
    (tmp_path / "opt" / "lib" / "pkgconfig" / "other.pc").touch()
    if not staged:
        (tmp_path / "opt" / "bin").mkdir()
        (tmp_path / "opt" / "share" / "man" / "man3").mkdir(parents=True)
    before = tree(tmp_path)
    for _ in range(2):
        assert make("install", **variables).returncode == 0
    added = {path: mode for path, mode in tree(tmp_path).items() if path not in before and not mode.startswith("d")}
    directories = [path for path in added if path.endswith("pqcancel/directories")]
    assert len(directories) == (0 if staged else 1)
    assert len(added) - len(directories) == len(installation.files("lib"))
    removed = make("uninstall", **variables)
    assert (removed.returncode, removed.stdout, removed.stderr) == (0, "", "")
    assert tree(tmp_path) == before
    assert make("uninstall", **variables).returncode == 0, "once more"


def test_install_builds_nothing(tmp_path):
    """So that whoever does it as root leaves nothing of root's behind. Where something is missing it says what to do."""
    empty = tmp_path / "empty"
    empty.mkdir()
    refused = make("install", BUILT=empty, DESTDIR=tmp_path / "stage")
    assert refused.returncode != 0 and "run `make` first" in refused.stderr
    assert list(empty.iterdir()) == [] and not (tmp_path / "stage").exists()


def test_a_place_that_the_command_would_not_find_is_refused(tmp_path):
    refused = make("install", PREFIX=tmp_path / "opt", LIBDIR=tmp_path / "far" / "away")
    assert refused.returncode != 0 and "run `make` with this LIBDIR first" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_into_the_system_itself_and_out_again(machine, monitor, eavesdropper, tmp_path):
    """In a copy of this machine. No variable has to be set by anybody: /usr/local is where all tools look."""
    before = machine.changes()
    words = ["make", f"--directory={peers.ROOT}", *installation.VARIABLES]
    machine.run(*words, "install")
    assert machine.changes() - before >= {f"/usr/local/{path}" for path in installation.files("lib")}
    program = installation.compile_in(machine, tmp_path, "pqcancel")
    assert installation.cancelled(monitor, eavesdropper, *machine.command(program)) == BY_NEW
    assert eavesdropper.cancels == ENCRYPTED
    assert machine.run("pqcancel", "psql", "--version").startswith("psql (PostgreSQL) ")
    machine.run(*words, "uninstall")
    assert machine.changes() == before
    assert "pqcancel" not in machine.run("ldconfig", "--print-cache")


# The command.

MAPS = "import ctypes; ctypes.CDLL('libpq.so.5').PQgetCancel; print(open('/proc/self/maps').read())"


@pytest.mark.parametrize("libdir", ["lib", "lib64", f"lib/{MULTIARCH}"])
def test_the_command_finds_the_library_in_a_tree_that_was_moved(tmp_path, libdir):
    """By its own place, with nothing but BINDIR in PATH. So does the drop-in, of which links would lead out of the tree."""
    assert make("install", DESTDIR=tmp_path / "made", PREFIX="/usr", LIBDIR=f"/usr/{libdir}").returncode == 0
    moved = (tmp_path / "made").rename(tmp_path / "moved") / "usr"
    library = moved / libdir / "libpqcancel.so.1"
    search = {"env": {"PATH": str(moved / "bin")}, "capture_output": True, "text": True, "check": True}
    assert subprocess.run(["pqcancel", "--version"], **search).stdout.endswith(f" (library: {library})\n")
    for option, mapped in (("--trace", ["libpqcancel.so.1.0"]),
                           ("--dlopen", ["libpqcancel.so.1.0", "pqcancel/dlopen/libpq.so.5"])):
        maps = subprocess.run(["pqcancel", option, sys.executable, "-c", MAPS], **search).stdout
        ours = set(re.findall(rf" {re.escape(str(moved / libdir))}/(\S+)", maps))
        assert ours == set(mapped), option
    alone = {"env": {"LD_LIBRARY_PATH": str(moved / libdir / "pqcancel" / "dlopen")}, "capture_output": True, "text": True}
    assert f" {library}.0\n" in subprocess.run([sys.executable, "-c", MAPS], **alone).stdout


# A program that was written for libpq 17.

def libpq_has_the_new_functions(prefix: Path) -> bool:
    [includes] = pkg_config(prefix, "--variable=includedir", "libpq")
    return "LIBPQ_HAS_ASYNC_CANCEL" in (Path(includes) / "libpq-fe.h").read_text()


@pytest.mark.parametrize("language", installation.COMPILERS)
def test_by_pkg_config_alone(prefix, monitor, eavesdropper, tmp_path, language):
    flags = pkg_config(prefix, "--cflags", "--libs", "pqcancel")
    subprocess.run(installation.compiled(language, tmp_path / "program", *flags), check=True)
    assert installation.needed(tmp_path / "program")[:2] == ["libpqcancel.so.1", "libpq.so.5"]
    told = installation.cancelled(monitor, eavesdropper, tmp_path / "program", LD_LIBRARY_PATH=str(prefix / "lib"))
    assert told == BY_NEW
    assert eavesdropper.cancels == ENCRYPTED


def test_without_pqcancel_it_takes_the_old_way(prefix, monitor, eavesdropper, tmp_path):
    """Control experiment: the same program and libpq."""
    if libpq_has_the_new_functions(prefix):
        pytest.skip("the installed libpq has them itself")
    flags = pkg_config(prefix, "--cflags", "--libs", "libpq")
    subprocess.run(installation.compiled("c", tmp_path / "program", *flags), check=True)
    assert installation.cancelled(monitor, eavesdropper, tmp_path / "program") == BY_OLD
    assert eavesdropper.cancels == READABLE


ORDERS = {
    "libpq-fe.h": "#include <libpq-fe.h>\n",
    "pqcancel.h": "#include <pqcancel.h>\n",
    "both": "#include <libpq-fe.h>\n#include <pqcancel.h>\n",
    "reverse": "#include <pqcancel.h>\n#include <libpq-fe.h>\n",
    "quoted": '#include "libpq-fe.h"\n',
}


@pytest.mark.parametrize("language", installation.COMPILERS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_way_to_include_it(prefix, language, order):
    lines = f"{ORDERS[order]}#ifndef LIBPQ_HAS_ASYNC_CANCEL\n#error\n#endif\n"
    text = lines + "PGcancelConn *(*create) (PGconn *) = PQcancelCreate;\n"
    command = [*installation.COMPILERS[language], *programs.WARNINGS, "-pedantic", "-fsyntax-only", "-",
               *pkg_config(prefix, "--cflags", "pqcancel")]
    subprocess.run(command, input=text, text=True, check=True)


CMAKE = """
cmake_minimum_required(VERSION 3.20)
project(program LANGUAGES C)
set(CMAKE_C_STANDARD 11)
add_compile_options(-Wall -Wextra -Werror -pedantic)
find_package(pqcancel 99 QUIET)
if(pqcancel_FOUND)
  message(FATAL_ERROR "there is no such version")
endif()
find_package(pqcancel 0.1 REQUIRED)
add_executable(with-shared {program})
target_link_libraries(with-shared pqcancel::pqcancel)
add_executable(with-static {program})
target_link_libraries(with-static pqcancel::static)
"""


def test_by_cmake_alone(prefix, monitor, eavesdropper, tmp_path):
    if not shutil.which("cmake"):
        pytest.skip("cmake is not here")
    (tmp_path / "CMakeLists.txt").write_text(CMAKE.format(program=installation.PROGRAM))
    quiet = {"check": True, "stdout": subprocess.DEVNULL}
    subprocess.run(["cmake", f"-DCMAKE_PREFIX_PATH={prefix}", "-S", tmp_path, "-B", tmp_path / "made"], **quiet)
    subprocess.run(["cmake", "--build", tmp_path / "made"], **quiet)
    for name in ("with-shared", "with-static"):
        assert installation.cancelled(monitor, eavesdropper, tmp_path / "made" / name) == BY_NEW
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=2)
    assert "libpqcancel.so.1" in installation.needed(tmp_path / "made" / "with-shared")
    assert "libpqcancel.so.1" not in installation.needed(tmp_path / "made" / "with-static")


# The static library.

OPENSSL = [] if has_private_openssl() else ["-lssl", "-lcrypto"]


def test_the_static_library_exports_what_the_shared_one_does(prefix):
    symbols = subprocess.run(["nm", "--extern-only", "--defined-only", "--format=posix", prefix / "lib" / "libpqcancel.a"],
                             check=True, capture_output=True, text=True).stdout
    assert sorted(line.split()[0] for line in symbols.splitlines()[1:]) == EXPORTS
    undefined = subprocess.run(["nm", "--undefined-only", "--format=posix", prefix / "lib" / "libpqcancel.a"], check=True,
                               capture_output=True, text=True).stdout
    assert [line for line in undefined.splitlines() if line.startswith("PQ")] == []


@pytest.fixture(scope="module")
def objects() -> list[Path]:
    """Of a program that calls all functions that cancel."""
    directory = programs.build_functions()
    return [directory / Path(source).with_suffix(".o") for source in programs.FUNCTIONS]


def link(output: Path, objects: list[Path], archive: Path) -> Path:
    return programs.cc(output, *objects, archive, *programs.pkg_config("--libs", "libpq"), *OPENSSL)


def openssl_of_libpq(found: set[bindings.Binding]) -> set[str]:
    """Whose OpenSSL it is that libpq calls."""
    return {re.sub(r"\.so\..*", "", binding.owner) for binding in found
            if binding.user.startswith("libpq.so") and re.match(r"(SSL|X509|CRYPTO|BIO)_", binding.name)}


def test_a_program_with_the_static_library(prefix, objects, eavesdropper, tmp_path):
    program = link(tmp_path / "program", objects, prefix / "lib" / "libpqcancel.a")
    assert "libpqcancel.so.1" not in installation.needed(program)
    environment = {"HOME": os.devnull, "DRIVER_MONITOR": eavesdropper.server.conninfo(sslmode="disable"),
                   **bindings.told_to(tmp_path / "loader")}
    result = subprocess.run([program, eavesdropper.conninfo(), "cancelled"], env=environment, check=True, capture_output=True,
                            text=True, timeout=100)
    assert result.stdout.count(" -> 1, query: 57014\n") == 4, result.stdout
    assert eavesdropper.cancels == Cancels(readable=0, encrypted=4)
    found = bindings.told(tmp_path / "loader")
    assert openssl_of_libpq(found) == {"libssl", "libcrypto"}
    assert {binding.name for binding in found if binding.owner == "program" and not binding.version} <= set(EXPORTS)


@pytest.mark.skipif(not has_private_openssl(), reason="there is no OpenSSL in it")
def test_cargos_own_static_library_would_hand_its_openssl_to_libpq(objects, tmp_path):
    """Control experiment: this is what tools/archive.sh is for. (Two OpenSSLs in one session may crash: none is begun.)"""
    program = link(tmp_path / "program", objects, LIBRARY.parent / "libpqcancel.a")
    result = subprocess.run([program], env=bindings.told_to(tmp_path / "loader"), capture_output=True, text=True)
    assert "usage: driver CONNINFO" in result.stderr
    assert openssl_of_libpq(bindings.told(tmp_path / "loader")) == {"program"}


RUST = """
use std::ffi::{c_char, c_int, c_void, CStr};
#[link(name = "pqcancel", kind = "static")]
unsafe extern "C" {
    fn PQcancelCreate(conn: *mut c_void) -> *mut c_void;
    fn PQcancelBlocking(cancel: *mut c_void) -> c_int;
    fn PQcancelErrorMessage(cancel: *mut c_void) -> *const c_char;
}
#[link(name = "pq")]
unsafe extern "C" {
    fn PQconnectdb(conninfo: *const c_char) -> *mut c_void;
}
fn main() {
    std::panic::set_hook(Box::new(|_| println!("panicked")));
    let caught = std::panic::catch_unwind(|| panic!());
    unsafe {
        let cancel = PQcancelCreate(PQconnectdb(c"host=@nobody-listens-here".as_ptr()));
        print!("{} {} ", caught.is_err(), PQcancelBlocking(cancel));
        println!("{}", CStr::from_ptr(PQcancelErrorMessage(cancel)).to_str().unwrap().trim());
    }
}
"""


def test_two_rusts_in_one_program(prefix, tmp_path):
    """Each with its own standard library, panic hook and unwinder."""
    if not shutil.which("rustc"):
        pytest.skip("rustc is not here")
    source, program = tmp_path / "program.rs", tmp_path / "program"
    source.write_text(RUST)
    libraries = [f"-L{prefix / 'lib'}", *(f"-Clink-arg={library}" for library in OPENSSL)]
    subprocess.run(["rustc", "--edition=2024", *libraries, "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True)
    assert output.stdout == "panicked\ntrue 0 connection not open\n"


def test_a_static_libpq_is_refused_by_the_linker(prefix, tmp_path):
    """A limit that is written down: its functions would be there twice. (From libpq 17 on they stand alone.)"""
    archive = Path(pkg_config(prefix, "--variable=libdir", "libpq")[0]) / "libpq.a"
    if not archive.exists() or libpq_has_the_new_functions(prefix):
        pytest.skip("there is no libpq.a here, or not an old one")
    flags = [*pkg_config(prefix, "--cflags", "pqcancel"), str(prefix / "lib" / "libpqcancel.a"), str(archive)]
    result = subprocess.run(installation.compiled("c", tmp_path / "program", *flags), env={**os.environ, "LC_ALL": "C"},
                            capture_output=True, text=True)
    assert result.returncode != 0 and "multiple definition of `PQgetCancel'" in result.stderr


# The manual.

def test_the_manual_of_the_library_tells_of_every_function(prefix):
    text = " ".join(manual(prefix / "share" / "man" / "man3" / "libpqcancel.3").split())
    for name in EXPORTS:
        assert text.count(f"{name}(") >= 2, f"{name}: its declaration, and what it does"
    missing = [word for word in ("RETURN VALUES", "Threads and signals", "signal handler", "ENVIRONMENT", "PQCANCEL_TIMEOUT",
                                 "PQCANCEL_TRACE", "PQCANCEL_LEGACY", "LIBPQ_HAS_ASYNC_CANCEL") if word not in text]
    assert not missing


def test_the_manual_declares_what_the_header_declares(prefix):
    header = (peers.ROOT / "include" / "pqcancel.h").read_text()
    text = manual(prefix / "share" / "man" / "man3" / "libpqcancel.3")
    synopsis = re.sub(r"\s+", " ", re.search(r"\nSYNOPSIS\n(.*?)\nDESCRIPTION\n", text, re.DOTALL).group(1))
    declared = re.findall(r"^(\w[^;{}#]*\bPQ\w+\([^)]*\));$", header, re.MULTILINE)
    assert len(declared) == len(EXPORTS)
    for declaration in declared:
        assert re.sub(r"\* ", "*", declaration) + ";" in synopsis.replace("* ", "*"), declaration
