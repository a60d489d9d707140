"""Every libpq against every server: which there are, and the table of what was cancelled. README carries the table."""

from __future__ import annotations

from collections import Counter

import peers

MAJORS = [*range(10, 19)]

# By libpq and server: how many queries were cancelled, each protected on the wire as its session was.
cancelled: Counter[tuple[int, int]] = Counter()


def version(major: int) -> str:
    """Without what the package adds to PostgreSQL's."""
    return ".".join(peers.EMBEDDED[major][0].split(".")[:2])


def table() -> str:
    """In Markdown. A row for each libpq, a column for each server."""
    rows = [["libpq \\ server", *map(version, MAJORS)], ["---", *("---:" for _ in MAJORS)]]
    for libpq in MAJORS:
        rows.append([version(libpq), *(str(cancelled[libpq, server]) for server in MAJORS)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
