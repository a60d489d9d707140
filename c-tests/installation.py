"""What `make install` and the packages put into a system: listed, and used as a developer would."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import peers
from library import LIBRARY, has_private_openssl
from machine_copy import MachineCopy
from monitor import DEADLINE, SLEEPING
from programs import SOURCES, WARNINGS

PROGRAM = SOURCES / "async_cancel.c"  # which knows nothing of pqcancel
BY_NEW, BY_OLD = (f"cancelled by the {which} functions\nSQLSTATE 57014\n" for which in ("new", "old"))

COMPILERS = {
    "c": ["cc", "-std=c11", "-xc"],
    "c++": ["c++", "-std=c++11", "-xc++"],
}

# What is under test, and no way to build it.
VARIABLES = [f"BUILT={LIBRARY.parent}", f"OPENSSL={'vendored' if has_private_openssl() else 'system'}", "CARGO=false"]

MULTIARCH = f"{os.uname().machine}-linux-gnu"


def files(libdir: str, *, compressed: str = "") -> dict[str, str]:
    """All that is installed below a prefix, with its rights, or where the link leads."""
    return {
        "bin/pqcancel": "-rwxr-xr-x",
        "include/pqcancel.h": "-rw-r--r--",
        "include/pqcancel/libpq-fe.h": "-rw-r--r--",
        f"{libdir}/cmake/pqcancel/pqcancel-config-version.cmake": "-rw-r--r--",
        f"{libdir}/cmake/pqcancel/pqcancel-config.cmake": "-rw-r--r--",
        f"{libdir}/libpqcancel.a": "-rw-r--r--",
        f"{libdir}/libpqcancel.so": "libpqcancel.so.1",
        f"{libdir}/libpqcancel.so.1": "libpqcancel.so.1.0",
        f"{libdir}/libpqcancel.so.1.0": "-rwxr-xr-x",
        f"{libdir}/pkgconfig/pqcancel.pc": "-rw-r--r--",
        f"{libdir}/pqcancel/dlopen/libpq-host.so.5": os.readlink(LIBRARY.parent / "dlopen" / "libpq-host.so.5"),
        f"{libdir}/pqcancel/dlopen/libpq.so.5": "-rwxr-xr-x",
        f"{libdir}/pqcancel/dlopen/libpqcancel.so.1": "../../libpqcancel.so.1",
        f"share/man/man1/pqcancel.1{compressed}": "-rw-r--r--",
        f"share/man/man3/libpqcancel.3{compressed}": "-rw-r--r--",
    }


def tree(directory: Path) -> dict[str, str]:
    """What is below a directory, in the same form; directories, too."""
    return {str(path.relative_to(directory)): os.readlink(path) if path.is_symlink() else stat.filemode(path.lstat().st_mode)
            for path in directory.rglob("*")}


def make(*goals: str, **variables: object) -> subprocess.CompletedProcess:
    return subprocess.run(["make", "--no-print-directory", f"--directory={peers.ROOT}", *goals, *VARIABLES,
                           *(f"{name}={value}" for name, value in variables.items())],
                          env={"PATH": os.environ.get("PATH", os.defpath), "HOME": os.devnull}, capture_output=True, text=True)


def compiled(language: str, output: Path, *flags: str) -> list[str]:
    """The command that makes the program; the strictest compiler finds nothing to complain of, in the headers neither."""
    return [*COMPILERS[language], *WARNINGS, "-pedantic", str(PROGRAM), "-xnone", *flags, "-o", str(output)]


def compile_in(machine: MachineCopy, directory: Path, module: str, **environment: str) -> Path:
    """A program by the flags of pkg-config alone, as it is made there."""
    flags = machine.run("pkg-config", "--cflags", "--libs", module, **environment).split()
    program = directory / f"with-{module}"
    assert machine.run(*compiled("c", program, *flags)) == ""
    return program


def cancelled(monitor, eavesdropper, *command: object, **environment: str) -> str:
    """What the program told of a query that was running when it cancelled it."""
    words = [*map(str, command), eavesdropper.conninfo()]
    with subprocess.Popen(words, env={"PATH": os.defpath, "HOME": os.devnull, **environment}, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            monitor.wait_for(1, eavesdropper.name, SLEEPING)
            return process.communicate("\n", timeout=DEADLINE)[0]
        except BaseException:
            process.kill()
            print(f"{words[0]} said: {process.stdout.read()}")  # which pytest shows of a test that failed
            raise


def needed(program: Path) -> list[str]:
    dynamic = subprocess.run(["readelf", "--wide", "--dynamic", program], check=True, capture_output=True, text=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
