"""The library file and its header: what programs, linkers and compilers see of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import programs
from library import LIBRARY, has_private_openssl
from programs import INCLUDE
from relocations import packed_relocations

EXPORTS = [
    "PQcancel", "PQcancelBlocking", "PQcancelCreate", "PQcancelErrorMessage", "PQcancelFinish", "PQcancelPoll",
    "PQcancelReset", "PQcancelSocket", "PQcancelStart", "PQcancelStatus", "PQfreeCancel", "PQgetCancel", "PQrequestCancel",
]

# The unwinder that Rust's panic guard needs is inside.
MAY_NEED = {"libc.so.6", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libm.so.6"}
OPENSSL = set() if has_private_openssl() else {"libssl.so.3", "libcrypto.so.3"}

# What runs when the library is loaded: the compiler's own registration of unwind tables, and Rust's standard library
# keeping argc and argv. Neither allocates, and nothing of ours or of OpenSSL's is among them.
CONSTRUCTORS = [r"frame_dummy", r".*ARGV_INIT_ARRAY.*init_wrapper"]

# Functions that change the host process or bypass what a preload is meant to see. (pthread_sigmask is not among them: the
# mask is changed while the courier is made, and put back.)
MUST_NOT_CALL = {
    "exit", "_exit", "quick_exit", "fork", "vfork", "execve", "execvp", "system", "popen", "dup2", "umask", "chdir",
    "setenv", "unsetenv", "putenv", "setlocale", "sigprocmask", "raise", "kill", "printf", "puts",
    "putchar", "getaddrinfo", "gethostbyname", "alarm", "setitimer", "sleep", "usleep", "getpwuid",
}

HEADER_15 = "libpq-fe.h"  # Debian's, of libpq 15


def readelf(*options: str, file: Path = LIBRARY) -> str:
    return subprocess.run(["readelf", "--wide", *options, file], check=True, capture_output=True, text=True).stdout


def dynamic_symbols(which: str) -> list[str]:
    output = subprocess.run(["nm", "--dynamic", which, "--format=posix", LIBRARY], check=True, capture_output=True,
                            text=True).stdout
    return sorted(line.split()[0].split("@")[0] for line in output.splitlines())


def test_exports():
    assert dynamic_symbols("--defined-only") == EXPORTS


def test_needs_neither_openssl_nor_libpq():
    """Also not through what it needs in turn: ldd shows the whole tree. (Unless it is built with OPENSSL=system.)"""
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("--dynamic")))
    assert needed and needed - MAY_NEED == OPENSSL
    tree = subprocess.run(["ldd", LIBRARY], check=True, capture_output=True, text=True).stdout
    assert "libc.so.6" in tree
    assert set(re.findall(r"^\s*((?:libssl|libcrypto|libpq)\S*) =>", tree, re.MULTILINE)) == OPENSSL, tree


def test_imports():
    """The host's libpq is found at run time, so nothing of it is imported; nor is what a guest must not do."""
    imported = dynamic_symbols("--undefined-only")
    assert "poll" in imported and "send" in imported
    assert [name for name in imported if name.startswith("PQ")] == []
    assert sorted(MUST_NOT_CALL & set(imported)) == []


def test_soname_and_flags():
    dynamic = readelf("--dynamic")
    assert re.findall(r"\(SONAME\).*\[(.*)\]", dynamic) == ["libpqcancel.so.1"]
    flags_1 = re.search(r"\(FLAGS_1\)\s+Flags: (.*)", dynamic).group(1).split()
    assert "NODELETE" in flags_1
    assert "NOW" in flags_1  # lazy binding would take the loader's lock at the first call, perhaps in a signal handler
    flags = re.search(r"\(FLAGS\)\s+(.*)", dynamic)
    assert flags and "BIND_NOW" in flags.group(1) and "STATIC_TLS" not in flags.group(1)
    for unwanted in ("(TEXTREL)", "(RPATH)", "(RUNPATH)"):
        assert unwanted not in dynamic


def test_no_initial_exec_tls():
    """The flag is the linker's word; the relocations are the fact: initial-exec variables need TPOFF."""
    relocations = readelf("--relocs")
    assert "JUMP_SLOT" in relocations
    assert "TPOFF" not in relocations.replace("DTPOFF", "")


def test_segments():
    segments = readelf("--program-headers")
    stack = re.search(r"GNU_STACK\s+(?:0x\w+\s+){5}([RWE ]+?)\s+\w+$", segments, re.MULTILINE)
    assert stack and stack.group(1) == "RW", segments
    assert "GNU_RELRO" in segments
    assert not re.search(r"LOAD.* (RWE|WE) ", segments)


def test_constructors():
    """Reads the addresses that DT_INIT_ARRAY holds, from whichever relocations, and names them by the symbol table."""
    dynamic = readelf("--dynamic")
    start = int(re.search(r"\(INIT_ARRAY\)\s+(0x\w+)", dynamic).group(1), 16)
    size = int(re.search(r"\(INIT_ARRAYSZ\)\s+(\d+)", dynamic).group(1))
    entries = [int(addend, 16) for offset, addend in re.findall(r"^(\w+)\s+\w+\s+R_\w+_RELATIVE\s+(\w+)$", readelf("--relocs"),
                                                                re.MULTILINE) if start <= int(offset, 16) < start + size]
    entries += [entry for slot, entry in packed_relocations(LIBRARY).items() if start <= slot < start + size]
    assert len(entries) == size // 8
    symbols = {int(value, 16): name for value, name in
               re.findall(r"^\s*\d+: (\w+)\s+\d+ FUNC\s+\w+\s+\w+\s+\w+ (\S+)", readelf("--symbols"), re.MULTILINE)}
    names = sorted(symbols.get(entry, hex(entry)) for entry in entries)
    print("DT_INIT_ARRAY:", *names)
    assert len(names) == len(CONSTRUCTORS)
    for name in names:
        assert any(re.fullmatch(pattern, name) for pattern in CONSTRUCTORS), names


def test_loading_does_next_to_nothing(tmp_path):
    """In a program that knows nothing of it: no other library is initialized, nothing is printed."""
    source = tmp_path / "nothing.c"
    source.write_text("int main(void) { return 0; }\n")
    program = programs.cc(tmp_path / "nothing", source)
    preloads = {"with": str(LIBRARY), "without": ""}
    opened = {}
    for name, preload in preloads.items():
        log = tmp_path / name
        environment = {"LD_PRELOAD": preload, "LD_DEBUG": "files", "LD_DEBUG_OUTPUT": str(log)}
        result = subprocess.run([program], env=environment, capture_output=True)
        assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
        text = "".join(path.read_text() for path in tmp_path.glob(f"{name}.*"))
        opened[name] = set(re.findall(r"calling init: \S*/([^/\s]+)", text))
    assert opened["with"] - opened["without"] == {LIBRARY.name, *OPENSSL}


# The header. Each case is what a program says before, and after, what it does with it.

USES = """
int use(PGconn *conn)
{
    PGcancelConn *cancel = PQcancelCreate(conn);
    PostgresPollingStatusType polling = PGRES_POLLING_WRITING;
    struct pg_cancel_conn *same = cancel;

    if (PQcancelStart(cancel) == 1 && PQcancelStatus(cancel) != CONNECTION_ALLOCATED && PQcancelSocket(same) >= 0)
        polling = PQcancelPoll(cancel);
    PQcancelReset(cancel);
    if (polling != PGRES_POLLING_OK && PQcancelBlocking(cancel) == 0 && PQcancelErrorMessage(cancel)[0] == 0)
        polling = PGRES_POLLING_FAILED;
    PQcancelFinish(cancel);
    return (int) polling;
}
"""

# The numbers are the binary interface: a program compiled with one header runs with the other's library.
VALUES = """
static_assert(CONNECTION_OK == 0, "");
static_assert(CONNECTION_BAD == 1, "");
static_assert(CONNECTION_STARTED == 2, "");
static_assert(CONNECTION_MADE == 3, "");
static_assert(CONNECTION_AWAITING_RESPONSE == 4, "");
static_assert(CONNECTION_SSL_STARTUP == 7, "");
static_assert(CONNECTION_ALLOCATED == 14, "");
static_assert(PGRES_POLLING_FAILED == 0, "");
static_assert(PGRES_POLLING_READING == 1, "");
static_assert(PGRES_POLLING_WRITING == 2, "");
static_assert(PGRES_POLLING_OK == 3, "");
static_assert(sizeof(ConnStatusType) == sizeof(int), "");
static_assert(LIBPQ_HAS_ASYNC_CANCEL == 1, "");
"""

INCLUDES = {
    "alone": "#include <pqcancel.h>\n",
    "after": "#include <libpq-fe.h>\n#include <pqcancel.h>\n",
    "before": "#include <pqcancel.h>\n#include <libpq-fe.h>\n",
    "twice": "#include <pqcancel.h>\n#include <pqcancel.h>\n",
}

COMPILERS = {
    "c11": ["cc", "-std=c11", "-xc", "-include", "assert.h"],
    "c17": ["cc", "-std=c17", "-xc", "-include", "assert.h"],
    "c++11": ["c++", "-std=c++11", "-xc++"],
    "c++17": ["c++", "-std=c++17", "-xc++"],
    "c++20": ["c++", "-std=c++20", "-xc++"],
}

# What libpq-fe.h of 17 and 18 declares beyond 15's, as far as it concerns this API.
DECLARED_SINCE_17 = """
#define LIBPQ_HAS_ASYNC_CANCEL 1
typedef struct pg_cancel_conn PGcancelConn;
extern PGcancelConn *PQcancelCreate(PGconn *conn);
extern int PQcancelStart(PGcancelConn *cancelConn);
extern int PQcancelBlocking(PGcancelConn *cancelConn);
extern PostgresPollingStatusType PQcancelPoll(PGcancelConn *cancelConn);
extern ConnStatusType PQcancelStatus(const PGcancelConn *cancelConn);
extern int PQcancelSocket(const PGcancelConn *cancelConn);
extern char *PQcancelErrorMessage(const PGcancelConn *cancelConn);
extern void PQcancelReset(PGcancelConn *cancelConn);
extern void PQcancelFinish(PGcancelConn *cancelConn);
"""


@pytest.fixture(scope="module", params=["15", "18"])
def libpq_headers(request, tmp_path_factory) -> Path:
    """Directory with libpq-fe.h: Debian's, and one with what 17 and 18 added, put together from Debian's."""
    installed = Path(subprocess.run(["pg_config", "--includedir"], check=True, capture_output=True, text=True).stdout.strip())
    if "LIBPQ_HAS_ASYNC_CANCEL" in (installed / HEADER_15).read_text():
        pytest.skip("the installed libpq-fe.h is 17's or later: the older one is not to be had")
    if request.param == "15":
        return installed
    made = tmp_path_factory.mktemp("libpq18")
    for name in (HEADER_15, "postgres_ext.h", "pg_config_ext.h"):
        shutil.copy(installed / name, made)
    text = (made / HEADER_15).read_text()
    text, statuses = re.subn(r"(CONNECTION_CHECK_STANDBY)(.*?)\} ConnStatusType;",
                             r"\1,\n\tCONNECTION_ALLOCATED,\n\tCONNECTION_AUTHENTICATING\n} ConnStatusType;", text,
                             flags=re.DOTALL)
    text, places = re.subn(r"(/\* request a cancel structure \*/)", lambda m: DECLARED_SINCE_17 + m.group(1), text)
    assert (statuses, places) == (1, 1)
    (made / HEADER_15).write_text(text)
    return made


def compile_text(text: str, compiler: str, headers: Path, *options: str) -> None:
    command = [*COMPILERS[compiler], "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{headers}", f"-I{INCLUDE}", *options,
               "-c", "-o", "/dev/null", "-"]
    result = subprocess.run(command, input=text, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("order", INCLUDES)
def test_header_compiles(libpq_headers, compiler, order):
    compile_text(INCLUDES[order] + USES + VALUES, compiler, libpq_headers)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_other_features_are_not_announced(libpq_headers, compiler):
    """Programs take other LIBPQ_HAS_ macros for all of libpq 17."""
    other = "\n".join(f"#ifdef LIBPQ_HAS_{feature}\n#error {feature}\n#endif" for feature in
                      ("CHANGE_PASSWORD", "CHUNK_MODE", "CLOSE_PREPARED", "SEND_PIPELINE_SYNC", "SOCKET_POLL"))
    compile_text(INCLUDES["alone"] + other + USES, compiler, libpq_headers)


# As programs are written that want to run with old and new libpqs.
WRITTEN_FOR_17 = """
#include <stdio.h>
#include <libpq-fe.h>

int main(int argc, char **argv)
{
    PGconn *conn = PQconnectdb(argc > 1 ? argv[1] : "");
#ifdef LIBPQ_HAS_ASYNC_CANCEL
    PGcancelConn *cancel = PQcancelCreate(conn);
    int result = PQcancelBlocking(cancel);
    printf("new %d %s", result, PQcancelErrorMessage(cancel));
    PQcancelFinish(cancel);
#else
    char error[256];
    PGcancel *cancel = PQgetCancel(conn);
    printf("old %d\\n", PQcancel(cancel, error, sizeof(error)));
    PQfreeCancel(cancel);
#endif
    PQfinish(conn);
    return 0;
}
"""


def test_program_written_for_libpq_17(tmp_path, servers):
    """Unchanged, with -include pqcancel.h: it takes the new way, and it works."""
    source = tmp_path / "program.c"
    source.write_text(WRITTEN_FOR_17)
    libraries = [f"-L{programs.library_directory()}", "-lpqcancel", *programs.pkg_config("--libs", "libpq")]
    new = programs.cc(tmp_path / "new", "-include", "pqcancel.h", source, *libraries)
    old = programs.cc(tmp_path / "old", source, *libraries)

    def output(program: Path, conninfo: str) -> str:
        return subprocess.run([program, conninfo], env=programs.environment(), check=True, capture_output=True, text=True).stdout

    conninfo = servers["15"].conninfo(sslmode="require")
    assert output(new, conninfo) == "new 1 "
    assert output(old, conninfo) == "old 1\n"
    assert output(new, "host=@nobody-listens-here") == "new 0 connection not open\n"
