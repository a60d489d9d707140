"""The goals, and whether they were met."""

from __future__ import annotations

from dataclasses import dataclass

import cancels
from cancels import BUNDLE, ONE_CA, PLAINTEXT, UNIX
from figures import LIBPQ, PQCANCEL, Figures, shown_ratio, written

RATIO, OURS, DIFFERENCE = "ratio to libpq", "ours", "more than without"


@dataclass(frozen=True)
class Goal:
    """Never more than the limit: of the ratio, of our own figure, or of the difference."""

    subject: str
    quantity: str
    limit: float
    kind: str = RATIO

    def value(self, figures: Figures, libpq: str = LIBPQ) -> float | None:
        """None: not measured here, or not over this libpq."""
        figure = figures.find(self.subject, self.quantity)
        if self.kind == OURS:
            return figure.samples[PQCANCEL].median if PQCANCEL in figure.samples else None
        return figure.ratio(to=libpq) if self.kind == RATIO else figure.difference()

    def is_met(self, figures: Figures, libpq: str = LIBPQ) -> bool | None:
        value = self.value(figures, libpq)
        return None if value is None else value <= self.limit

    def judged(self, figures: Figures, libpq: str = LIBPQ) -> str:
        return {True: "met", False: "MISSED", None: "-"}[self.is_met(figures, libpq)]

    def shown(self, number: float | None, figures: Figures) -> str:
        if number is None or self.kind == RATIO:
            return shown_ratio(number)
        return written(number, figures.find(self.subject, self.quantity).unit)


def each_way(transport: str, quantity: str, limit: float) -> list[Goal]:
    """But PQcancel, which libpq sends in plaintext: nothing to compare."""
    return [Goal(f"{transport}: {way}", quantity, limit) for way in cancels.NEW_WAYS]


def goals(figures: Figures) -> list[Goal]:
    """With those of the servers that round trips were counted on."""
    trips = [subject for subject, quantity in figures.all if quantity == "round trips"]
    return [
        *each_way(ONE_CA, "processor", 0.45),
        *each_way(ONE_CA, "wall", 1.0),
        *each_way(BUNDLE, "processor", 0.03),
        Goal(f"{BUNDLE}: later", "dearest poll", 0.05),
        Goal(f"{BUNDLE}: first", "processor", 1.0),
        Goal(f"{BUNDLE}: first", "dearest poll", 0.1),  # this low only if the CAs are not read inside PQcancelPoll
        *each_way(PLAINTEXT, "processor", 0.8),
        *each_way(UNIX, "processor", 0.8),
        *(Goal(subject, "round trips", 3 if subject.startswith("direct") else 4, OURS)
          for subject in trips if "TLS" in subject),
        Goal(cancels.CREATE.format(ONE_CA), "wall", 1.0),
        Goal(cancels.CREATE.format(PLAINTEXT), "wall", 1.0),
        Goal(cancels.GET.format(ONE_CA), "wall", 1e-6, OURS),
        Goal(cancels.GET.format(PLAINTEXT), "wall", 1e-6, OURS),
        Goal(cancels.AT_ONCE, "processor", 0.45),
        Goal(cancels.AT_ONCE, "allocated", 1.0),
        Goal("pgbench", "wall", 1.01),
        Goal("start of /bin/true", "wall", 0.6e-3, DIFFERENCE),
        Goal("memory of /bin/cat", "resident", 2 * 2**20, DIFFERENCE),
    ]
