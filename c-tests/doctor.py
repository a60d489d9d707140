"""`pqcancel doctor`, from an installation of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from library import LIBRARY
from monitor import DEADLINE
from preloaded import WRAPPER

GOOD, WEAK, FAILED, REFUSED = 0, 1, 2, 125
WIDTH = 100


@dataclass(frozen=True)
class Findings:
    """What was printed, as a page and as JSON, by two examinations of the same."""

    status: int
    page: str
    facts: dict
    stderr: str

    @property
    def output(self) -> str:
        """All of it, to look for what must not be there."""
        return self.page + json.dumps(self.facts, ensure_ascii=False) + self.stderr

    @property
    def session(self) -> dict:
        return self.facts["session"]

    @property
    def cancels(self) -> dict:
        return self.facts["cancels"]

    @property
    def advice(self) -> dict[str, str]:
        """By its weight."""
        return {advice["weight"]: advice["text"] for advice in self.facts["advice"]}


class Doctor:
    """For use in a `with` statement. Nothing of the user's own is known to it but what `environment` says."""

    def __enter__(self) -> "Doctor":
        self.directory = tempfile.TemporaryDirectory(prefix="pqcancel-doctor-")
        self.home = Path(self.directory.name).resolve()
        self.command = Path(shutil.copy(WRAPPER, self.home / "pqcancel"))
        self.library = Path(shutil.copy(LIBRARY, self.home / "libpqcancel.so.1"))
        return self

    def __exit__(self, *_exception) -> None:
        self.directory.cleanup()

    def words(self, *arguments) -> list[str]:
        return [str(word) for word in (self.command, "doctor", *arguments)]

    def environment(self, **more) -> dict[str, str]:
        return {"PATH": os.defpath, "HOME": str(self.home), "LC_ALL": "C", **{name: str(value) for name, value in more.items()}}

    def run(self, *arguments, environment: dict | None = None, **rest) -> subprocess.CompletedProcess:
        return subprocess.run(self.words(*arguments), env=self.environment(**(environment or {})), stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=2 * DEADLINE, **rest)

    def examine(self, *arguments, **environment) -> Findings:
        """Runs it twice. Both forms must agree."""
        page = self.run(*arguments, environment=environment)
        as_json = self.run("--json", *arguments, environment=environment)
        print(page.stdout, page.stderr, as_json.stdout)  # which pytest shows of a test that failed
        assert (page.returncode, bool(page.stderr)) == (as_json.returncode, bool(as_json.stderr))
        facts = json.loads(as_json.stdout)
        assert facts["status"] == page.returncode
        findings = Findings(page.returncode, page.stdout, facts, page.stderr + as_json.stderr)
        assert_same(findings)
        return findings


def assert_same(findings: Findings) -> None:
    """What the one form says, the other says, too; and the page is not too wide for a terminal."""
    page, facts = " ".join(findings.page.split()), findings.facts
    said = [facts["pqcancel"]["library"], facts["pqcancel"]["openssl"], facts["libpq"]["library"], facts["libpq"]["version"]]
    if "error" in facts:
        assert facts["error"].split("\n")[0] in findings.stderr
    else:
        session = facts["session"]
        said += [facts["server"]["version"], facts["server"]["port"], session["protocol"], session["cipher"],
                 session["certificate"], facts["unwatched"]]
        for cancel in filter(None, (facts["cancels"][name] for name in ("PQcancelPoll", "PQcancel"))):
            said += [step["step"] for step in cancel["steps"]] + [cancel["message"], cancel["sqlstate"]]
        said += [advice["text"] for advice in facts["advice"]]
    for text in filter(None, said):
        assert " ".join(text.split()) in page
    assert all(len(line) <= WIDTH or " " not in line.strip() for line in findings.page.splitlines())
