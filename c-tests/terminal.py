"""A program in a pseudo-terminal, used as a person would: text typed, keys pressed, output read as it comes."""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

from monitor import DEADLINE

CTRL_C = b"\x03"
LOCAL_MODES = 3  # in what tcgetattr() answers
SIZE = struct.pack("HHHH", 50, 200, 0, 0)  # lines and columns: wide enough that no line of a test is broken
OVERLAP = 4096  # no text that is looked for is longer
SHOWN = 4000  # characters of the output, where something failed
# What a person types into: a shell with job control, which puts the program into the foreground and stays behind. Were
# the program itself the session's leader, its end would send SIGHUP to its children.
SHELL = ["setsid", "--ctty", "sh", "-m", "-c", '"$@"; exit $?', "sh"]


class Terminal:
    """A pseudo-terminal with a shell that runs one program, for use in a `with` statement; all that runs in it ends with it.

    Ctrl-C reaches the program as at any terminal: as SIGINT from the kernel, to its whole process group. Output that
    nobody reads waits in the terminal, and then the program waits.
    """

    def __init__(self, command: list, environment: dict[str, str], directory: Path | str = "/"):
        self.command = [str(word) for word in command]
        self.environment, self.directory = {"TERM": "xterm", **environment}, directory
        self.output = ""
        self.position = 0  # in output, behind what was expected last

    def __enter__(self) -> "Terminal":
        self.screen, self.line = os.openpty()
        try:
            fcntl.ioctl(self.line, termios.TIOCSWINSZ, SIZE)
            self._keep_output()
            self.settings_at_start = self.settings()
            self.shell = subprocess.Popen([*SHELL, *self.command], stdin=self.line, stdout=self.line, stderr=self.line,
                                          env=self.environment, cwd=self.directory)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_exception) -> None:
        for pid in {self.shell.pid, *self.processes()}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # ended by itself meanwhile
                pass
        self.shell.wait()
        while self._read(0):
            pass
        print(f"{self.command[0]} in its terminal:\n{self.output[-SHOWN:]}")  # which pytest shows of a test that failed
        self._close()

    def type(self, line: str) -> None:
        os.write(self.screen, line.encode() + b"\n")

    def press(self, keys: bytes) -> None:
        os.write(self.screen, keys)

    def expect(self, pattern: str) -> re.Match:
        """Reads until the pattern has come, after what was expected before; answers the match."""
        deadline = time.monotonic() + DEADLINE
        while True:
            match = re.compile(pattern).search(self.output, self.position)
            if match:
                self.position = match.end()
                return match
            self.position = max(self.position, len(self.output) - OVERLAP)
            if not self._read(max(0.0, deadline - time.monotonic())):
                raise AssertionError(f"{pattern!r} does not come")

    def settings(self) -> list:
        """What tcgetattr() tells: modes, speeds, special characters."""
        return termios.tcgetattr(self.line)

    def wait(self) -> int:
        """Reads to the end of the program; answers its exit status, or minus the signal that ended it."""
        deadline = time.monotonic() + DEADLINE
        while self.shell.poll() is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"{self.command[0]} does not end")
            self._read(0.01)
        while self._read(0):
            pass
        return self.shell.returncode

    def processes(self) -> set[int]:
        """What runs in this terminal beside the shell: the program and its children, and theirs."""
        return {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_ours(pid)}

    def is_asleep(self) -> bool:
        """Does all that runs in this terminal wait for something, and not for the processor?"""
        return all(_state_and_session(pid)[0] == "S" for pid in self.processes())

    def _keep_output(self) -> None:
        """By default the kernel throws away on Ctrl-C what nobody has read yet: of ten at once, what came of the first."""
        settings = self.settings()
        settings[LOCAL_MODES] |= termios.NOFLSH
        termios.tcsetattr(self.line, termios.TCSANOW, settings)

    def _is_ours(self, pid: int) -> bool:
        try:
            state, session = _state_and_session(pid)
        except (FileNotFoundError, ProcessLookupError):
            return False
        return session == self.shell.pid != pid and state not in "ZX"

    def _read(self, seconds: float) -> bool:
        """Takes what has come, waiting so long for it."""
        if not select.select([self.screen], [], [], seconds)[0]:
            return False
        self.output += os.read(self.screen, 65536).decode(errors="replace").replace("\r\n", "\n")
        return True

    def _close(self) -> None:
        os.close(self.screen)
        os.close(self.line)


def _state_and_session(pid: int) -> tuple[str, int]:
    """As the kernel names them."""
    state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    return state, int(session)
