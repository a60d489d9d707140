"""Figures: what was measured, its statistics, and how numbers are written. The one place for all three."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

LIBPQ, PQCANCEL = "libpq 18", "pqcancel"
BARE = "system calls alone"

# Of a unit: how much one of it is, its name. The largest that a number is not below is used.
SCALES = {
    "s": [(1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")],
    "bytes": [(2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")],
    "": [(1e6, "M"), (1e3, "k"), (1.0, "")],
}


class Samples(list):
    """Numbers that ought to be the same. None of them is ever left out."""

    @property
    def median(self) -> float:
        return statistics.median(self)

    @property
    def low(self) -> float:
        return min(self)

    @property
    def high(self) -> float:
        return max(self)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self) < 2:
            return self.low, self.high
        first, _, third = statistics.quantiles(self, n=4, method="inclusive")
        return first, third


@dataclass
class Figure:
    """One quantity of one subject, by side; a sample for each round."""

    subject: str
    quantity: str
    unit: str
    samples: dict[str, Samples] = field(default_factory=dict)

    def add(self, side: str, number: float) -> None:
        self.samples.setdefault(side, Samples()).append(number)

    def ratio(self, side: str = PQCANCEL, to: str = LIBPQ) -> float | None:
        """Of the medians. None where either was not measured, or there is nothing to divide by."""
        if side not in self.samples or to not in self.samples or not self.samples[to].median:
            return None
        return self.samples[side].median / self.samples[to].median

    def difference(self) -> float | None:
        if LIBPQ not in self.samples or PQCANCEL not in self.samples:
            return None
        return self.samples[PQCANCEL].median - self.samples[LIBPQ].median

    def shown(self, side: str, spread: bool = True) -> str:
        """The median, and with spread the quartiles in brackets: between them is the middle half."""
        samples = self.samples.get(side)
        if not samples:
            return "-"
        first, third = samples.quartiles
        if not spread or first == third:
            return written(samples.median, self.unit)
        scale, name = scale_of(samples.median, self.unit)
        return f"{digits(samples.median / scale)} ({digits(first / scale)}..{digits(third / scale)}) {name}".rstrip()

    def as_json(self) -> dict:
        sides = {side: {"median": samples.median, "min": samples.low, "max": samples.high,
                        "quartiles": samples.quartiles, "samples": samples} for side, samples in self.samples.items()}
        return {"subject": self.subject, "quantity": self.quantity, "unit": self.unit, "ratio": self.ratio(), **sides}


class Figures:
    """All figures of a run, in the order in which they were first seen."""

    def __init__(self):
        self.all: dict[tuple[str, str], Figure] = {}

    def add(self, subject: str, quantity: str, unit: str, side: str, number: float) -> None:
        self.all.setdefault((subject, quantity), Figure(subject, quantity, unit)).add(side, number)

    def find(self, subject: str, quantity: str) -> Figure:
        """Without samples, if there is none: not every machine can measure everything."""
        return self.all.get((subject, quantity)) or Figure(subject, quantity, "")


def scale_of(number: float, unit: str) -> tuple[float, str]:
    scales = SCALES.get(unit, [(1.0, unit)])
    return next((scale for scale in scales if abs(number) >= scale[0]), scales[-1])


def digits(number: float) -> str:
    """Three that count, and no more after the point than a whole number has."""
    if number == round(number) and abs(number) < 1000:
        return f"{number:.0f}"
    return f"{number:.2f}" if abs(number) < 10 else f"{number:.1f}" if abs(number) < 100 else f"{number:.0f}"


def written(number: float, unit: str) -> str:
    scale, name = scale_of(number, unit)
    return f"{digits(number / scale)} {name}".rstrip()


def shown_ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.3f}"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right. A row of one cell is a heading among the rows."""
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[i]) for row in [headings, *full]) for i in range(len(headings))]

    def line(row: list[str]) -> str:
        if len(row) == 1:
            return row[0]
        cells = [cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(headings), "  ".join("-" * width for width in widths), *map(line, rows)])
