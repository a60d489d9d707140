"""How the demo's page looks: headings, time lines, and two columns of bytes; nothing wider than WIDTH."""

from __future__ import annotations

import os
import sys
import textwrap

from eavesdrop import Connection
from decode import TLS13_OVERHEAD, Event, Reading, merged

WIDTH = 100
LEFT = 44  # the left one of the two columns; " | " and the right one have the rest
MARGIN = "   "

BOLD, DIM, RED, GREEN = "1", "2", "31", "32"
_COLOURS = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

Row = tuple[bytes, str, str]  # the bytes, what they are, their colour


def show(text: str = "") -> None:
    # At once, so that who pipes the page sees it grow as well.
    print(text, flush=True)


def coloured(text: str, colour: str) -> str:
    return f"\033[{colour}m{text}\033[0m" if _COLOURS and colour else text


def heading(text: str) -> None:
    show()
    show(coloured(text, BOLD))


def paragraph(text: str, indent: str = "", colour: str = "") -> None:
    for line in textwrap.wrap(text, WIDTH - len(indent), break_on_hyphens=False):
        show(indent + coloured(line, colour))


def quoted(text: str) -> None:
    """What a program printed."""
    for line in text.splitlines():
        show(f"{MARGIN}| {line}")


def time_line(connection: Connection, reading: Reading) -> None:
    events = merged(reading.events)
    for event in events:
        size = f"{len(event.data):5} byte{'s' if len(event.data) > 1 else ''}" if event.data else ""
        line = f"{MARGIN}{event.time * 1e3:7.2f} ms  {event.sender}  {event.what}"
        show(coloured(f"{line:{WIDTH - 12}} {size}".rstrip(), _importance(event)))
    show(f"{MARGIN}{connection.round_trips()} round trips, {events[-1].time * 1e3:.2f} ms")


def _importance(event: Event) -> str:
    if event.what == "CancelRequest":
        return RED
    return GREEN if event.what.startswith("CancelRequest") else ""


def columns(left_title: str, left: Reading, right_title: str, right: Reading) -> None:
    """Two columns of hex and ASCII: what the eavesdropper holds of each cancel request."""
    show(coloured(f"{left_title:{LEFT}} | {right_title}", BOLD))
    show("-" * (LEFT + 1) + "+" + "-" * (WIDTH - LEFT - 2))
    left_lines, right_lines = _lines(_rows(left)), _lines(_rows(right))
    for at in range(max(len(left_lines), len(right_lines))):
        plain, colour = left_lines[at] if at < len(left_lines) else ("", "")
        other, other_colour = right_lines[at] if at < len(right_lines) else ("", "")
        show(f"{coloured(f'{plain:{LEFT}}', colour)} | {coloured(other, other_colour)}".rstrip())


def _lines(rows: list[Row]) -> list[tuple[str, str]]:
    most = max((len(data) for data, _, _ in rows), default=0)
    return [(f"{data.hex(' '):{most * 3 - 1}}  {_ascii(data):{most}}  {label}", colour) for data, label, colour in rows]


def _ascii(data: bytes) -> str:
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in data)


def _rows(reading: Reading) -> list[Row]:
    if reading.cancel:
        return _plain_rows(reading)
    return _sealed_rows(reading) if reading.sealed else []


def _plain_rows(reading: Reading) -> list[Row]:
    cancel = reading.cancel
    length, code, pid = (cancel.packet[at:at + 4] for at in (0, 4, 8))
    rows = [(length, f"length {len(cancel.packet)}", ""), (code, "CancelRequest", ""),
            (pid, f"{f'PID {cancel.pid}':12} <== readable", RED)]
    parts = [cancel.key[at:at + 4] for at in range(0, len(cancel.key), 4)]  # 4 bytes, up to 256 with protocol 3.2
    return rows + [(part, "" if at else f"{'cancel key':12} <== readable", RED) for at, part in enumerate(parts)]


def _sealed_rows(reading: Reading) -> list[Row]:
    record = reading.sealed
    header = len(record.data) - len(record.body)
    parts = [record.body[at:at + 8] for at in range(0, len(record.body), 8)]
    labels = [f"{len(record.body)} of ciphertext"]
    if reading.version == "TLSv1.3":
        request = len(record.body) - TLS13_OVERHEAD
        labels += [f"= {request} of request", "+  1 of type", f"+ {TLS13_OVERHEAD - 1} of tag"]
    labels += [""] * len(parts)
    return [(record.data[:header], "TLS record header", "")] + [
        (part, label, GREEN) for part, label in zip(parts, labels)]
