"""A copy of this machine's files, to be changed at will: an overlay in a mount namespace of its own, which is gone as soon as
this process is. Needs root, and a kernel that lets it mount."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

# $1: a directory of the caller's. The others: directories that are not copied, but the same inside and outside.
MOUNT = """
mount -t tmpfs tmpfs "$1"
mkdir "$1/changes" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/changes,workdir=$1/work" overlay "$1/root"
root=$1/root
shift
for directory in /proc /sys /dev; do mount --rbind $directory "$root$directory"; done
for directory; do mkdir -p "$root$directory"; mount --bind "$directory" "$root$directory"; done
echo mounted
exec cat
"""


PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # root's

# What package managers and the loader keep for themselves.
BOOKKEEPING = re.compile(r"/(var/lib/(dpkg|rpm)|root/\.rpmdb|var/log|var/cache|etc/ld\.so\.cache)\b.*")


class CannotCopy(Exception):
    """Not by this user, or not on this kernel."""


class MachineCopy:
    """For use in a `with` statement."""

    def __init__(self, directory: Path, *shared: Path):
        self.directory, self.shared = directory, shared

    def __enter__(self) -> "MachineCopy":
        if os.geteuid() != 0 or not shutil.which("unshare"):
            raise CannotCopy("needs root, and unshare")
        command = ["unshare", "--mount", "--propagation=private", "sh", "-ec", MOUNT, "sh", self.directory, *self.shared]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        text=True)
        said = self.process.stdout.readline()
        if said != "mounted\n":
            self.__exit__()
            raise CannotCopy(said.strip())
        return self

    def __exit__(self, *_exception) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _outside(self, *words: object) -> list[str]:
        return ["nsenter", f"--target={self.process.pid}", "--mount", *map(str, words)]

    def command(self, *words: object) -> list[str]:
        """What runs these words in the copy."""
        return self._outside("/usr/sbin/chroot", self.directory / "root", *words)

    def run(self, *words: object, **environment: str) -> str:
        """Returns what was said on stdout. Nothing may be said on stderr, and nothing may fail."""
        environment = {"PATH": PATH, "LC_ALL": "C", **environment}
        result = subprocess.run(self.command(*words), env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, ""), result
        return result.stdout

    def changes(self) -> set[str]:
        """All that is not as on the machine itself: added, changed, or taken away; a directory only if it was added."""
        found = subprocess.run(self._outside("find", self.directory / "changes", "-mindepth", "1", "-printf", "%y /%P\\n"),
                               check=True, capture_output=True, text=True).stdout
        changed = (line.split(" ", 1) for line in found.splitlines())
        return {path for kind, path in changed if not (kind == "d" and Path(path).is_dir()) and not BOOKKEEPING.fullmatch(path)}
