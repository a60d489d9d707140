"""The command `pqcancel PROGRAM ...`: it becomes the program with the library in it, or says why it does not.

PQCANCEL_WRAPPER names the command under test. It is always run from an installation of its own, never from where it was built.
"""

from __future__ import annotations

import errno
import os
import platform
import resource
import shutil
import signal
import stat
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

import peers
import programs
from preloaded import DROPIN, WRAPPER

SONAME = "libpqcancel.so.1"
MANUAL = peers.ROOT / "man" / "pqcancel.1"

ENVIRONMENT = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C"}
DEADLINE = 120  # seconds

REAL_LIBPQ = (DROPIN / "libpq-host.so.5").resolve()

# ELF: where the class and the machine stand, and values that are not this machine's.
CLASS_AT, MACHINE_AT = 4, 18
CLASS_32, MACHINE_S390 = b"\x01", struct.pack("=H", 22)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: other users' rights are tested")


class Installation:
    """A prefix with the command in bin and the library in `libdir`, in a `with` statement. Any user may enter."""

    def __init__(self, libdir: str | None = "lib", name: str = SONAME, below: str = ""):
        self.libdir, self.name, self.below = libdir, name, below

    def __enter__(self) -> "Installation":
        self.directory = tempfile.TemporaryDirectory(prefix="pqcancel-wrapper-")
        os.chmod(self.directory.name, 0o755)
        self.prefix = Path(self.directory.name).resolve() / self.below
        self.command = self.prefix / "bin" / "pqcancel"
        self.command.parent.mkdir(parents=True)
        shutil.copy(WRAPPER, self.command)
        self.library = None
        if self.libdir:
            self.library = self.prefix / self.libdir / self.name
            self.library.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(programs.LIBRARY, self.library)
        return self

    def __exit__(self, *_exception) -> None:
        self.directory.cleanup()

    def run(self, *arguments, command: Path | str | None = None, env: dict[str, str] | None = None,
            **rest) -> subprocess.CompletedProcess:
        """Runs the command with nothing in the environment but a PATH and `env`."""
        rest = {"stdin": None if "input" in rest else subprocess.DEVNULL, "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE, "text": True, "timeout": DEADLINE, **rest}
        return subprocess.run([command or self.command, *arguments], env={**ENVIRONMENT, **(env or {})}, **rest)

    def output(self, *arguments, **rest) -> str:
        result = self.run(*arguments, **rest)
        assert (result.returncode, result.stderr) == (0, ""), result
        return result.stdout

    def refusal(self, *arguments, status: int = 125, **rest) -> str:
        """One line on stderr, and nothing has run."""
        result = self.run(*arguments, **rest)
        assert (result.returncode, result.stdout) == (status, ""), result
        assert result.stderr.startswith("pqcancel: ") and result.stderr.count("\n") == 1, result
        return result.stderr

    def copy(self, program: str, mode: int = 0o755) -> Path:
        """A program of the system, with rights of our own choice."""
        path = self.prefix / program
        shutil.copy(shutil.which(program), path)
        path.chmod(mode)
        return path

    def drop_in(self, directory: str, libpq: Path | None = None) -> Path:
        """A directory of three links, the last of them to this libpq, by default the machine's."""
        path = self.prefix / directory
        path.mkdir(parents=True)
        links = {"libpq.so.5": DROPIN / "libpq.so.5", SONAME: self.library, "libpq-host.so.5": libpq or REAL_LIBPQ}
        for name, target in links.items():
            (path / name).symlink_to(target)
        return path

    def write(self, name: str, content: str, mode: int = 0o755) -> Path:
        path = self.prefix / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        path.chmod(mode)
        return path


@pytest.fixture
def installed():
    with Installation() as made:
        yield made


def as_user(name: str) -> dict:
    """Arguments of subprocess.run: the process is an unprivileged user's."""
    return {"user": name, "group": "nogroup", "extra_groups": []}


# The library is found, and loaded.

MULTIARCH = f"lib/{platform.machine()}-linux-gnu"


@pytest.mark.parametrize("name", [SONAME, "libpqcancel.so"])
@pytest.mark.parametrize("libdir", ["bin", "lib", "lib64", MULTIARCH, "lib/pqcancel"])
def test_the_library_is_found_where_it_was_installed_and_loaded(libdir, name):
    with Installation(libdir, name) as installed:
        assert installed.output("printenv", "LD_PRELOAD") == f"{installed.library}\n"
        assert f" {installed.library}\n" in installed.output("cat", "/proc/self/maps")


def test_the_library_beside_the_command_comes_first(installed):
    beside = shutil.copy(installed.library, installed.command.parent)
    assert installed.output("printenv", "LD_PRELOAD") == f"{beside}\n"


def test_a_symbolic_link_to_the_command_finds_the_library_of_the_real_one(installed):
    with Installation(None) as elsewhere:
        elsewhere.command.unlink()
        elsewhere.command.symlink_to(installed.command)
        assert elsewhere.output("printenv", "LD_PRELOAD") == f"{installed.library}\n"


def test_the_command_is_found_in_path(installed):
    path = f"{installed.command.parent}:{ENVIRONMENT['PATH']}"
    output = subprocess.run("pqcancel printenv LD_PRELOAD", shell=True, env={"PATH": path}, capture_output=True, text=True)
    assert (output.stdout, output.stderr) == (f"{installed.library}\n", "")


@pytest.mark.parametrize("at,value", [(CLASS_AT, CLASS_32), (MACHINE_AT, MACHINE_S390)], ids=["class", "machine"])
def test_a_library_for_another_machine_is_passed_over(installed, at, value):
    patch(Path(shutil.copy(installed.library, installed.command.parent)), at, value)
    assert installed.output("printenv", "LD_PRELOAD") == f"{installed.library}\n"


@pytest.mark.parametrize("before,after", [("libm.so.6", ":libm.so.6"), ("libm.so.6:libdl.so.2", ":libm.so.6:libdl.so.2"),
                                          ("libm.so.6 libdl.so.2", ":libm.so.6 libdl.so.2"), ("", "")])
def test_what_is_preloaded_already_stays_behind_the_library(installed, before, after):
    output = installed.output("printenv", "LD_PRELOAD", env={"LD_PRELOAD": before})
    assert output == f"{installed.library}{after}\n"


def test_a_missing_library_is_refused():
    with Installation(None) as installed:
        assert SONAME in installed.refusal("echo", "ran")


@pytest.mark.parametrize("below", ["a space", "a:colon", "a$ORIGIN"])
def test_a_path_that_ld_preload_cannot_hold_is_refused(below):
    with Installation(below=below) as installed:
        assert "cannot be preloaded" in installed.refusal("echo", "ran")


# Programs that the dynamic loader would not load it into.

def patch(path: Path, at: int, value: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[at:at + len(value)] = value
    path.write_bytes(content)
    return path


def give_capability(path: Path) -> Path:
    """cap_net_bind_service=ep, as setcap(8) writes it (version 2)."""
    try:
        os.setxattr(path, "security.capability", struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0))
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP):
            raise
        pytest.skip(f"file capabilities cannot be set here: {error}")
    return path


def compile_echo(installed: Installation, *options: str) -> Path:
    source = installed.write("echo.c", '#include <stdio.h>\nint main(void) { return puts("ran") < 0; }\n')
    path = installed.prefix / "compiled"
    subprocess.run(["cc", *programs.WARNINGS, *options, source, "-o", path], check=True)
    return path


REFUSED = {
    "setuid": (lambda i: i.copy("echo", 0o4755), "is setuid"),
    "setgid": (lambda i: i.copy("echo", 0o2755), "is setgid"),
    "capabilities": (lambda i: give_capability(i.copy("echo")), "has file capabilities"),
    "static": (lambda i: compile_echo(i, "-static"), "is statically linked"),
    "static-pie": (lambda i: compile_echo(i, "-static-pie", "-fPIE"), "is statically linked"),
    "class": (lambda i: patch(i.copy("echo"), CLASS_AT, CLASS_32), "is for another kind of machine"),
    "machine": (lambda i: patch(i.copy("echo"), MACHINE_AT, MACHINE_S390), "is for another kind of machine"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_program_that_would_ignore_the_library_is_refused(installed, how):
    make, reason = REFUSED[how]
    program = make(installed)
    assert f'pqcancel: "{program}" {reason}: ' in installed.refusal(program, "ran")


@pytest.mark.parametrize("how", REFUSED)
def test_so_is_a_script_whose_interpreter_would(installed, how):
    make, reason = REFUSED[how]
    interpreter = make(installed)
    script = installed.write("script", f"#! \t{interpreter} argument\n")
    nested = installed.write("nested", f"#!{script}\n")
    for program in (script, nested):
        assert f'pqcancel: "{interpreter}" {reason}: ' in installed.refusal(program)


@pytest.mark.parametrize("name", ["setuid", "setgid"])
@as_root
def test_there_the_loader_would_have_said_nothing(installed, name):
    """Control experiment: this is what the refusals are for."""
    program = installed.copy("printenv", REFUSED[name][0](installed).stat().st_mode & 0o7777)
    shutil.chown(program, "daemon", "daemon")
    program.chmod(0o4755 if name == "setuid" else 0o2755)
    straight = subprocess.run([program, "LD_PRELOAD"], env={"LD_PRELOAD": str(installed.library)}, capture_output=True,
                              text=True, **as_user("nobody"))
    assert (straight.returncode, straight.stdout, straight.stderr) == (1, "", ""), straight


@as_root
def test_with_another_effective_user_every_program_would_ignore_it(installed):
    reason = installed.refusal("echo", "ran", preexec_fn=lambda: os.seteuid(65534))
    assert "real and effective user or group differ" in reason
    reason = installed.refusal("echo", "ran", preexec_fn=lambda: os.setegid(65534))
    assert "real and effective user or group differ" in reason


# Programs that are fine.

@pytest.mark.parametrize("line", ["#!/bin/sh", "#! /bin/sh", "#!\t/bin/sh -u", "#!/bin/sh -u "])
def test_a_script_runs_with_the_library(installed, line):
    script = installed.write("script", f'{line}\necho "$LD_PRELOAD $0 $*"\n')
    assert installed.output(script, "a", "b") == f"{installed.library} {script} a b\n"


def test_a_file_without_an_interpreter_runs_in_the_shell_as_with_env(installed):
    script = installed.write("script", 'echo "$LD_PRELOAD"\n')
    assert installed.output(script) == f"{installed.library}\n"


def test_rights_that_linux_does_not_give_are_no_reason_to_refuse(installed):
    """A script's own set-user-ID bit means nothing, nor does a set-group-ID bit where the group may not execute."""
    assert installed.output(installed.write("script", "#!/bin/sh\necho ran\n", 0o6755)) == "ran\n"
    assert installed.output(installed.copy("echo", 0o2745), "ran") == "ran\n"


@as_root
def test_a_program_that_may_be_executed_but_not_read(installed):
    program = installed.copy("printenv", 0o711)
    assert installed.output(program, "LD_PRELOAD", **as_user("nobody")) == f"{installed.library}\n"


@pytest.mark.skipif(not Path("/usr/share/postgresql-common/pg_wrapper").exists(), reason="Debian's psql is not here")
def test_debians_psql_is_a_script(installed):
    assert installed.output("/usr/bin/psql", "--version").startswith("psql (PostgreSQL)")


# It becomes the program.

def test_it_is_the_same_process(installed):
    with subprocess.Popen([installed.command, "sh", "-c", "echo $$"], stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate(timeout=DEADLINE) == (f"{process.pid}\n", None)


def test_the_exit_status_is_the_programs(installed):
    for status in (0, 7, 125, 255):
        result = installed.run("sh", "-c", f"exit {status}")
        assert (result.returncode, result.stderr) == (status, "")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGPIPE", "SIGINT"])
def test_so_is_death_by_a_signal(installed, name):
    result = installed.run("sh", "-c", f"kill -{name[3:]} $$")
    assert (result.returncode, result.stderr) == (-signal.Signals[name], "")


def test_arguments_arrive_byte_by_byte(installed):
    arguments = [b"", b"a b", b"--trace", b"--", b"\xff\xfe", b"new\nline", b"*"]
    output = installed.run("cat", "/proc/self/cmdline", text=False).stdout
    assert output == b"cat\0/proc/self/cmdline\0"
    output = installed.run("printf", "%s|", *arguments, text=False).stdout
    assert output == b"".join(argument + b"|" for argument in arguments)


SHOWS = {
    "directory": ["pwd"],
    "environment": ["env", "--unset=LD_PRELOAD"],
    "limits": ["cat", "/proc/self/limits"],
    "stdin": ["cat"],
    "descriptors": ["ls", "/proc/self/fd"],
    "signals": ["grep", "-E", "^(SigBlk|SigIgn|Umask)", "/proc/self/status"],
}


@pytest.mark.parametrize("what", SHOWS)
def test_the_rest_of_the_process_is_as_it_was(installed, what):
    def prepare() -> None:
        os.umask(0o27)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (77, 77))

    with tempfile.TemporaryFile() as kept:
        same = {"cwd": installed.prefix, "pass_fds": [kept.fileno()], "preexec_fn": prepare,
                "input": "through stdin\n", "env": {**ENVIRONMENT, "WITH": "a\nnew line"}}
        straight = installed.run(*SHOWS[what][1:], command=shutil.which(SHOWS[what][0]), **same)
        wrapped = installed.run(*SHOWS[what], **same)
        shows = {"directory": str(installed.prefix), "environment": "WITH=a\nnew line\n", "limits": " 77 ",
                 "stdin": "through stdin", "descriptors": f"\n{kept.fileno()}\n",
                 "signals": "0001\n"}  # SIGHUP is ignored, and whatever the caller ignores
    assert shows[what] in straight.stdout, straight
    assert (wrapped.returncode, wrapped.stderr) == (0, "")
    assert sorted(wrapped.stdout.splitlines()) == sorted(straight.stdout.splitlines())


@pytest.mark.parametrize("action", [signal.SIG_IGN, signal.SIG_DFL])
def test_sigpipe_is_as_it_was(installed, action):
    """Ignored by services of systemd, for example. Rust's runtime would not keep it."""
    before = {"preexec_fn": lambda: signal.signal(signal.SIGPIPE, action), "restore_signals": False}
    survives = installed.run("sh", "-c", "kill -PIPE $$", **before).returncode == 0
    assert survives == (action == signal.SIG_IGN)


def test_a_closed_descriptor_stays_closed(installed):
    """Rust's runtime would open it."""
    result = installed.run("ls", "/proc/self/fd", preexec_fn=lambda: os.close(0))
    straight = installed.run("/proc/self/fd", command="ls", preexec_fn=lambda: os.close(0))
    assert result.stdout.split() == straight.stdout.split()


# Finding the program, and what cannot be executed: as env(1) does.

CANNOT = {
    "not in PATH": (["no-such-program"], 127),
    "not in a directory": (["/no/such/program"], 127),
    "empty name": ([""], 127),
    "script without its interpreter": (["{prefix}/orphan"], 127),
    "below a file": (["{prefix}/plain/program"], 126),
    "not executable": (["{prefix}/plain"], 126),
    "not executable, in PATH": (["plain"], 126),
    "a directory": (["{prefix}/bin"], 126),
    "a directory, in PATH": (["bin"], 126),
    "a FIFO": (["{prefix}/fifo"], 126),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_executed_is_as_with_env(installed, case):
    command, status = CANNOT[case]
    installed.write("plain", "#!/bin/sh\necho ran\n", 0o644)
    installed.write("orphan", "#!/no/such/interpreter\n")
    os.mkfifo(installed.prefix / "fifo", 0o755)
    command = [argument.format(prefix=installed.prefix) for argument in command]
    path = {"PATH": f"/no/such/directory:{installed.prefix}:/usr/bin"}
    oracle = subprocess.run([shutil.which("env"), *command], env=path, capture_output=True, text=True)
    assert oracle.returncode == status, oracle
    refusal = installed.refusal(*command, status=status, env=path)
    assert refusal == f'pqcancel: "{command[0]}": {oracle.stderr.rpartition(": ")[2]}'


@pytest.mark.parametrize("path,found", [
    ("{p}/one:{p}/two", "two/tool"),  # what cannot be executed is passed over
    ("{p}/two:{p}/three", "two/tool"),
    ("/no/such:{p}/dir:{p}/three", "three/tool"),  # so is a directory of that name
    (":{p}/three", "tool"),  # an empty entry is the current directory
    ("{p}/three:", "three/tool"),
    ("three", "three/tool"),  # relative to the current directory
])
def test_path_is_searched_as_by_execvp(installed, path, found):
    (installed.prefix / "dir" / "tool").mkdir(parents=True)
    for name, mode in (("one/tool", 0o644), ("two/tool", 0o755), ("three/tool", 0o755), ("tool", 0o755)):
        installed.write(name, f"#!/bin/sh\necho {name} is $0\n", mode)
    searched = {"env": {"PATH": path.format(p=installed.prefix)}, "cwd": installed.prefix}
    output = installed.output("tool", **searched)
    assert output.startswith(f"{found} is ")
    assert output == subprocess.check_output([shutil.which("env"), "tool"], text=True, **searched)


def test_without_path_the_systems_own_directories_are_searched(installed):
    result = subprocess.run([installed.command, "echo", "ran"], env={}, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("ran\n", "")


# Options.

def test_trace_is_handed_to_the_library(installed):
    show = ["printenv", "PQCANCEL_TRACE"]
    directory = installed.prefix / "elsewhere"
    directory.mkdir()
    for option, value in {"--trace": "stderr", "--trace=stderr": "stderr", "--trace=trace.log": f"{directory}/trace.log",
                          "--trace=./stderr": f"{directory}/stderr", "--trace=/dev/null": "/dev/null"}.items():
        assert installed.output(option, *show, cwd=directory) == f"{value}\n", option
    assert list(directory.iterdir()) == []
    assert installed.output("--trace=one", "--trace", *show) == "stderr\n"
    assert installed.output(*show, env={"PQCANCEL_TRACE": "kept"}) == "kept\n"
    assert installed.run(*show).returncode == 1, "no trace unless asked for"


def test_a_trace_file_that_cannot_be_written_is_refused(installed):
    """Else nobody would ever hear of it."""
    assert "No such file or directory" in installed.refusal("--trace=no/such/directory/trace", "echo", "ran")


@as_root
def test_so_is_one_that_the_user_may_not_write(installed):
    public = installed.prefix / "public"
    public.mkdir()
    public.chmod(0o777)
    installed.write("public/roots", "", 0o644)
    for name, fine in (("new", False), ("public/roots", False), ("public/new", True)):
        command = [f"--trace={installed.prefix}/{name}", "echo", "ran"]
        if fine:
            assert installed.output(*command, **as_user("nobody")) == "ran\n"
        else:
            assert "Permission denied" in installed.refusal(*command, **as_user("nobody"))


def test_options_end_at_the_program(installed):
    assert installed.output("echo", "--version", "--trace", "--") == "--version --trace --\n"
    assert installed.output("--", "echo", "--", "--help") == "-- --help\n"
    assert installed.output("--trace", "--", "printenv", "PQCANCEL_TRACE") == "stderr\n"
    dashed = installed.write("--help", "#!/bin/sh\necho my own\n")
    assert installed.output("--", "--help", env={"PATH": str(dashed.parent)}) == "my own\n"


@pytest.mark.parametrize("arguments", [["--traces"], ["-x", "echo"], ["--trace="], ["--dlopen="], ["--Version"],
                                       ["--version=1"], ["-=x", "echo"], ["--=x", "echo"], ["--trace", "-t", "echo"]])
def test_an_unknown_option_is_refused_with_the_usage(installed, arguments):
    refusal = installed.refusal(*arguments)
    assert "unknown option" in refusal and "usage: pqcancel [--trace[=FILE]] [--dlopen[=DIR]] [--] PROGRAM" in refusal


@pytest.mark.parametrize("arguments", [[], ["--"], ["--trace"]])
def test_a_program_must_be_named(installed, arguments):
    refusal = installed.refusal(*arguments)
    assert "no program is named" in refusal and "usage: " in refusal


def test_version_tells_which_library_is_used(installed):
    assert installed.output("--version") == f"pqcancel 0.1.0 (library: {installed.library})\n"
    with Installation(None) as without:
        assert without.output("--version").startswith(f"pqcancel 0.1.0 (no library: {SONAME} is neither beside ")


def test_output_that_cannot_be_written_is_a_failure(installed):
    with open("/dev/full", "w") as full:
        for option in ("--help", "--version"):
            result = installed.run(option, stdout=full)
            assert (result.returncode, result.stderr) == (125, "pqcancel: stdout: No space left on device\n")


# The drop-in, for programs that open libpq by themselves. (test_dropin.py has what it does.)

SHOW_PATH = ["printenv", "LD_LIBRARY_PATH"]


@pytest.mark.parametrize("libdir,name", [("bin", "dlopen"), ("lib", "dlopen"), ("lib", "pqcancel/dlopen"),
                                         ("lib64", "pqcancel/dlopen"), (MULTIARCH, "pqcancel/dlopen"),
                                         (MULTIARCH, "../pqcancel/dlopen"), ("lib/pqcancel", "dlopen")])
def test_the_drop_in_is_found_near_the_library(libdir, name):
    with Installation(libdir) as installed:
        drop_in = installed.drop_in(os.path.normpath(f"{libdir}/{name}"))
        assert installed.output("--dlopen", *SHOW_PATH) == f"{drop_in}\n"
        assert installed.output("--dlopen", "printenv", "LD_PRELOAD") == f"{installed.library}\n"
        assert installed.run(*SHOW_PATH).returncode == 1, "only if it is asked for"


def test_the_program_finds_the_drop_in(installed):
    """Python's ctypes, say. The libpq behind it is the one that it finds without."""
    drop_in = installed.drop_in("lib/dlopen")
    script = "import ctypes; ctypes.CDLL('libpq.so.5'); print(open('/proc/self/maps').read())"
    maps = installed.output("--dlopen", "/usr/bin/python3", "-c", script)
    assert f" {(drop_in / 'libpq.so.5').resolve()}\n" in maps and f" {REAL_LIBPQ}\n" in maps
    maps = installed.output("/usr/bin/python3", "-c", script)
    assert f" {REAL_LIBPQ}\n" in maps and str(DROPIN) not in maps


def test_a_named_drop_in_comes_first_and_does_not_move(installed):
    installed.drop_in("lib/dlopen")
    other = installed.drop_in("with a space")
    for name in (str(other), "with a space", "./with a space"):
        assert installed.output(f"--dlopen={name}", *SHOW_PATH, cwd=installed.prefix) == f"{other}\n"
    assert installed.output("--dlopen", f"--dlopen={other}", *SHOW_PATH) == f"{other}\n"


@pytest.mark.parametrize("before,after", [("/no/such", ":/no/such"), ("/no:/such", ":/no:/such"), (":", "::"), ("", "")])
def test_what_is_searched_already_stays_behind_it(installed, before, after):
    drop_in = installed.drop_in("lib/dlopen")
    assert installed.output("--dlopen", *SHOW_PATH, env={"LD_LIBRARY_PATH": before}) == f"{drop_in}{after}\n"


def test_a_missing_drop_in_is_refused(installed):
    (installed.prefix / "lib" / "dlopen").mkdir()
    assert "no drop-in (dlopen/libpq.so.5 with its libpq-host.so.5) is near" in installed.refusal("--dlopen", "echo", "ran")
    for name in ("libpq-host.so.5", "libpq.so.5"):
        missing = installed.drop_in(f"without {name}") / name
        option, reason = f"--dlopen={missing.parent}", f'"{missing.parent}" is no drop-in: "{missing}" is missing'
        missing.unlink()
        assert reason in installed.refusal(option, "echo", "ran")
        missing.symlink_to("/no/such/libpq.so.5")
        assert reason in installed.refusal(option, "echo", "ran")
    assert f'"{REAL_LIBPQ.parent}" is no drop-in' in installed.refusal(f"--dlopen={REAL_LIBPQ.parent}", "echo", "ran")


def test_one_for_another_machine_is_passed_over_or_refused(installed):
    for name in ("libpq.so.5", "libpq-host.so.5"):
        other = installed.drop_in(f"other-{name}")
        foreign = other / name
        content = foreign.read_bytes()
        foreign.unlink()
        foreign.write_bytes(content)
        patch(foreign, MACHINE_AT, MACHINE_S390)
        refusal = installed.refusal(f"--dlopen={other}", "echo", "ran")
        assert f'"{foreign}" is missing, or no library for this machine' in refusal
    other.rename(installed.prefix / "lib" / "dlopen")
    fitting = installed.drop_in("lib/pqcancel/dlopen")
    assert installed.output("--dlopen", *SHOW_PATH) == f"{fitting}\n"


@pytest.mark.parametrize("name", ["a:colon", "a;semicolon", "a$ORIGIN"])
def test_a_place_that_ld_library_path_cannot_hold_is_refused(installed, name):
    assert "cannot be searched" in installed.refusal(f"--dlopen={installed.drop_in(name)}", "echo", "ran")


@pytest.fixture
def other_libpq(installed):
    """Directory with a libpq.so.5 that is another file."""
    directory = installed.prefix / "other"
    directory.mkdir()
    shutil.copy(REAL_LIBPQ, directory / "libpq.so.5")
    return directory


@pytest.mark.parametrize("path", ["{other}", "/no/such/place:{other}", "/no/such/place;{other}", "{other}:{same}", ":{same}",
                                  "{same}:", "{foreign}:{other}", "{other_drop_in}:{same}"])
def test_the_libpq_must_be_the_one_that_the_program_would_find_without(installed, other_libpq, path):
    """In what LD_LIBRARY_PATH holds already. Else the program would run on another libpq without anybody having said so."""
    installed.drop_in("lib/dlopen")
    fitting = installed.drop_in("fitting", other_libpq / "libpq.so.5")
    foreign = installed.prefix / "foreign"
    foreign.mkdir()
    patch(Path(shutil.copy(REAL_LIBPQ, foreign / "libpq.so.5")), CLASS_AT, CLASS_32)
    path = path.format(other=other_libpq, same=REAL_LIBPQ.parent, foreign=foreign, other_drop_in=fitting)
    before = {"env": {"LD_LIBRARY_PATH": path}, "cwd": other_libpq}
    if path.startswith(str(REAL_LIBPQ.parent)):
        assert installed.output("--dlopen", "echo", "ran", **before) == "ran\n"
        return
    refusal = installed.refusal("--dlopen", "echo", "ran", **before)
    assert "LD_LIBRARY_PATH leads to" in refusal and '.so.5", and the drop-in to another libpq' in refusal
    assert f'"{REAL_LIBPQ}"' in refusal and "--dlopen=DIR" in refusal
    assert installed.output(f"--dlopen={fitting}", *SHOW_PATH, **before) == f"{fitting}:{path}\n"


def test_the_same_drop_in_twice(installed):
    """A program started so may start others so."""
    drop_in = installed.drop_in("lib/dlopen")
    output = installed.output("--dlopen", installed.command, "--dlopen", *SHOW_PATH)
    assert output == f"{drop_in}:{drop_in}\n"


# What is written about it.

OPTIONS = ["--trace", "--trace=FILE", "--dlopen", "--dlopen=DIR", "--version", "--help"]
VARIABLES = ["LD_PRELOAD", "LD_LIBRARY_PATH", "PQCANCEL_TRACE", "PQCANCEL_TIMEOUT", "PQCANCEL_LEGACY"]
LIMITS = ["setuid", "setgid", "capabilities", "statically linked", "another machine", "interpreter", "dlopen", "ctypes",
          "by its path", "DT_RUNPATH"]


def manual(page: Path = MANUAL) -> str:
    """A manual page as people read it, which needs groff; its warnings are errors."""
    if not shutil.which("groff"):
        pytest.skip("groff is not here")
    command = ["groff", "-mdoc", "-Tascii", "-P-c", "-P-b", "-P-u", "-rHY=0", "-ww", page]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, ""), result
    return result.stdout


@pytest.mark.parametrize("source", ["help", "manual"])
def test_every_option_variable_status_and_limit_is_written_down(installed, source):
    text = manual() if source == "manual" else installed.output("--help")
    text = " ".join(text.split())
    missing = [word for word in [*OPTIONS, *VARIABLES, *LIMITS, "125", "126", "127"] if word not in text]
    assert not missing


def test_it_is_an_ordinary_file(installed):
    """Not setuid itself, and not linked with the library that it names."""
    assert stat.S_IMODE(WRAPPER.stat().st_mode) & 0o6000 == 0
    needed = subprocess.run(["readelf", "--dynamic", WRAPPER], capture_output=True, text=True, check=True).stdout
    assert "libc.so.6" in needed and not any(name in needed for name in ("pqcancel", "libpq.", "libssl", "libcrypto"))
