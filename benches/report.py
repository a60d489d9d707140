"""The tables."""

from __future__ import annotations

from typing import Callable

import cancels
import distances
from figures import BARE, LIBPQ, PQCANCEL, Figures, shown_ratio, table, written
from goals import goals
from sides import Side, Sides

Rows = list[list[str]]


class Report:
    def __init__(self, figures: Figures, sides: Sides, crowd: int):
        self.figures, self.crowd = figures, crowd
        self.libpqs = (sides.libpq, *sides.others)
        self.goals = {(goal.subject, goal.quantity): goal for goal in goals(figures)}

    def text(self) -> str:
        parts = [self.times(), self.counts(), self.other_openssls(), self.steps(), self.one_each(), self.distances(),
                 self.preload(), self.all_goals()]
        return "\n\n".join(parts)

    def times(self) -> str:
        headings = ["one cancel", "wall: libpq", "pqcancel", "ratio", "", "processor: libpq", "pqcancel", "ratio", ""]
        rows = self._cancels("wall", lambda subject: self._compared(subject, "wall") + self._compared(subject, "processor"))
        return (f"{table(headings, rows)}\n"
                "(1) libpq's PQcancel sends the cancel of a TLS session in plaintext; pqcancel's goes over TLS, by a thread of "
                "its own,\n    whose processor time is counted. blocking, polled: PQcancelCreate to PQcancelFinish; reset: one "
                "object, PQcancelBlocking\n    and PQcancelReset; PQcancel: of one PGcancel.")

    def counts(self) -> str:
        quantities = ["instructions", "allocations", "system calls"]
        headings = ["one cancel"]
        for quantity in quantities:
            headings += [f"{quantity}: libpq", "pqcancel", "ratio"]
        rows = self._cancels("allocations", lambda subject: [
            cell for quantity in quantities for cell in self._compared(subject, quantity)[:3]])
        return (f"{table(headings, rows)}\n"
                "Instructions in user space, as callgrind counts them: it knows fewer processor extensions than there are. The "
                "program's own\npoll() is among the system calls.")

    def other_openssls(self) -> str:
        """The goals that depend on it."""
        headings = ["libpq 18 on several OpenSSLs", "pqcancel", "ratio at most"]
        for side in self.libpqs:
            headings += [f"{side.openssl}: libpq", "ratio"]
        rows: Rows = []
        for (subject, quantity), goal in self.goals.items():
            figure = self.figures.find(subject, quantity)
            if all(side.name in figure.samples for side in self.libpqs):
                cells = [cell for side in self.libpqs
                         for cell in (figure.shown(side.name, spread=False), shown_ratio(figure.ratio(to=side.name)))]
                rows.append([f"{subject}: {quantity}", figure.shown(PQCANCEL, spread=False), shown_ratio(goal.limit), *cells])
        return table(headings, rows)

    def steps(self) -> str:
        rows: Rows = []
        for subject, quantity in self.figures.all:
            if subject.endswith((": first", ": later")) and quantity != "wall":
                rows.append([f"{subject}: {quantity}", *self._compared(subject, quantity)])
        return (f"{table(['the first cancel of a process, and later ones (polled)', 'libpq', 'pqcancel', 'ratio', ''], rows)}\n"
                "Create, dearest poll: processor time of the thread in PQcancelCreate, and in the dearest single PQcancelPoll.")

    def one_each(self) -> str:
        rows: Rows = [[f"{self.crowd} at once: {name}", *self._compared(cancels.AT_ONCE, quantity)] for name, quantity in (
            ("wall time of all", "wall"), ("processor time of one", "processor"), ("dearest PQcancelPoll", "dearest poll"),
            ("allocated for one at the peak", "allocated"), ("resident for one at the peak", "resident"))]
        for name in (cancels.CREATE, cancels.GET):
            for transport in (cancels.ONE_CA, cancels.PLAINTEXT):
                rows.append([name.format(transport), *self._compared(name.format(transport), "wall")])
        return table([f"in one epoll loop ({cancels.ONE_CA}); without any I/O", "libpq", "pqcancel", "ratio", ""], rows)

    def distances(self) -> str:
        rows: Rows = []
        for subject, quantity in self.figures.all:
            if quantity == "round trips":
                wall = self.figures.find(subject, "wall")
                rows.append([subject, *self._compared(subject, quantity), wall.shown(LIBPQ), wall.shown(PQCANCEL)])
        away = written(2 * distances.DELAY, "s")
        headings = [f"round trips to a server {away} away", "libpq", "pqcancel", "ratio", "", "wall: libpq", "pqcancel"]
        return (f"{table(headings, rows)}\nThe TCP handshake is one of them; the proxy cannot make that one long.")

    def preload(self) -> str:
        rows: Rows = []
        for subject, quantity in self.figures.all:
            if subject.startswith(("pgbench", "start of", "memory of")):
                figure = self.figures.find(subject, quantity)
                without, preloaded, *judged = self._compared(subject, quantity)
                rows.append([f"{subject}: {quantity}", without, preloaded, written(figure.difference(), figure.unit), *judged])
        return (f"{table(['preloaded into programs that cancel nothing', 'without', 'with', 'more', 'ratio', ''], rows)}\n"
                "pgbench: wall is how long one transaction keeps it, without the connecting; processor its own time for one.")

    def all_goals(self) -> str:
        """A column for each libpq. What OpenSSL has no part in was measured over one only."""
        headings = ["goal", "what", "at most"]
        for side in self.libpqs:
            headings += [side.openssl, ""]
        rows: Rows = []
        for goal in self.goals.values():
            row = [f"{goal.subject}: {goal.quantity}", goal.kind, goal.shown(goal.limit, self.figures)]
            for side in self.libpqs:
                row += [goal.shown(goal.value(self.figures, side.name), self.figures), goal.judged(self.figures, side.name)]
            rows.append(row)
        return "\n".join([table(headings, rows), *map(self._met, self.libpqs), *self._floors()])

    def _floors(self) -> list[str]:
        """What no client could get below."""
        lines = []
        for transport in (cancels.PLAINTEXT, cancels.UNIX):
            for way in cancels.NEW_WAYS:
                figure = self.figures.find(f"{transport}: {way}", "processor")
                ratio = figure.ratio(side=BARE)
                if ratio is not None:
                    lines.append(f"{figure.subject}: socket, connect, send, recv and close alone take "
                                 f"{figure.shown(BARE, spread=False)} of processor time, {shown_ratio(ratio)} of libpq's.")
        return lines

    def _met(self, side: Side) -> str:
        judged = [goal.is_met(self.figures, side.name) for goal in self.goals.values()]
        judged = [verdict for verdict in judged if verdict is not None]
        return f"Against libpq 18 on {side.openssl}, {sum(judged)} of {len(judged)} goals are met."

    def _cancels(self, quantity: str, cells: Callable[[str], list[str]]) -> Rows:
        """A row for each kind of session and way to cancel of which the quantity was measured."""
        rows: Rows = []
        for subject, measured in self.figures.all:
            transport, _, way = subject.partition(": ")
            if measured == quantity and way in cancels.WAYS:
                if way == cancels.WAYS[0]:
                    rows.append([transport])
                rows.append([f"  {way}{' (1)' if self._is_in_plaintext_over_libpq(subject) else ''}", *cells(subject)])
        return rows

    def _is_in_plaintext_over_libpq(self, subject: str) -> bool:
        """And not over pqcancel: then a ratio tells nothing."""
        return subject.startswith("TLS") and subject.endswith(": PQcancel")

    def _compared(self, subject: str, quantity: str) -> list[str]:
        """libpq's, ours, the ratio, and how the goal stands, if there is one."""
        figure = self.figures.find(subject, quantity)
        goal = self.goals.get((subject, quantity))
        limit = f"<= {goal.shown(goal.limit, self.figures)} {goal.judged(self.figures)}" if goal else ""
        ratio = None if self._is_in_plaintext_over_libpq(subject) else figure.ratio()
        return [figure.shown(LIBPQ), figure.shown(PQCANCEL), shown_ratio(ratio), limit]
