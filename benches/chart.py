"""The chart: for each quantity two bars, libpq's and ours, in proportion. libpq's is as long in every row, so that
microseconds and mebibytes stand in one picture; a stroke marks the goal, where it is a ratio."""

from __future__ import annotations

from xml.sax.saxutils import escape

import cancels
from figures import LIBPQ, PQCANCEL, Figure, Figures, shown_ratio, written
from goals import RATIO, Goal, goals

WIDTH, MARGIN, LABELS, FULL = 960, 24, 296, 480
ROW, BAR, GAP = 40, 12, 2
THEIRS, OURS, INK, PALE, GOAL = "#9aa5b1", "#336791", "#1f2933", "#616e7c", "#c2410c"
MOST = 1.15  # a longer bar is cut here, and its number tells the rest


def wanted(crowd: int) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """By section: label, subject, quantity."""
    time, dearest = "processor", "dearest poll"
    return [
        ("Processor time of one cancel (client)", [
            (f"{cancels.ONE_CA}", f"{cancels.ONE_CA}: blocking", time),
            (f"{cancels.CLIENT_CERTIFICATE}", f"{cancels.CLIENT_CERTIFICATE}: blocking", time),
            (f"{cancels.BUNDLE} (machine's)", f"{cancels.BUNDLE}: blocking", time),
            (f"{cancels.SYSTEM}", f"{cancels.SYSTEM}: blocking", time),
            (f"{cancels.BUNDLE}, first of a process", f"{cancels.BUNDLE}: first", time),
            (f"{cancels.PLAINTEXT}", f"{cancels.PLAINTEXT}: blocking", time),
            (f"{cancels.UNIX}", f"{cancels.UNIX}: blocking", time),
        ]),
        ("Longest stall of an event loop (dearest PQcancelPoll, processor time)", [
            (cancels.ONE_CA, f"{cancels.ONE_CA}: later", dearest),
            (cancels.BUNDLE, f"{cancels.BUNDLE}: later", dearest),
            (f"{cancels.BUNDLE}, first of a process", f"{cancels.BUNDLE}: first", dearest),
        ]),
        (f"{crowd} cancels at once in one epoll loop ({cancels.ONE_CA})", [
            ("processor time of one", cancels.AT_ONCE, time),
            ("memory of one, allocated at the peak", cancels.AT_ONCE, "allocated"),
            ("wall time of all", cancels.AT_ONCE, "wall"),
        ]),
        ("Round trips", []),  # of the servers there were
        ("Wall time", [
            (f"cancel, {cancels.ONE_CA}", f"{cancels.ONE_CA}: blocking", "wall"),
            (f"cancel, {cancels.BUNDLE}", f"{cancels.BUNDLE}: blocking", "wall"),
            (f"cancel, {cancels.PLAINTEXT}", f"{cancels.PLAINTEXT}: blocking", "wall"),
            ("PQcancelCreate + Finish, TLS", cancels.CREATE.format(cancels.ONE_CA), "wall"),
            ("transaction of pgbench, preloaded", "pgbench", "wall"),
        ]),
    ]


def draw(figures: Figures, description: list[tuple[str, str]], remarks: list[str], crowd: int) -> str:
    by_figure = {(goal.subject, goal.quantity): goal for goal in goals(figures)}
    body, y = _head(description), 110
    for title, entries in wanted(crowd):
        if title == "Round trips":
            entries = [(subject, subject, quantity) for subject, quantity in figures.all if quantity == "round trips"]
        drawn = [(label, figures.find(subject, quantity), by_figure.get((subject, quantity)))
                 for label, subject, quantity in entries if figures.find(subject, quantity).ratio() is not None]
        if not drawn:
            continue
        body.append(_text(MARGIN, y + 14, title, weight="600"))
        y += 28
        for label, figure, goal in drawn:
            body += _row(y, label, figure, goal)
            y += ROW
        y += 18
    for line in remarks:
        body.append(_text(MARGIN, y + 6, line, PALE, 11))
        y += 16
    y += 12
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
            'font-family="system-ui, -apple-system, \'DejaVu Sans\', sans-serif" font-size="13">\n'
            f'<rect width="{WIDTH}" height="{y}" fill="#ffffff"/>\n' + "\n".join(body) + "\n</svg>\n")


def _head(description: list[tuple[str, str]]) -> list[str]:
    known = dict(description)
    server = known["servers"].split("; ")[-1]
    lines = [known["machine"], f"{LIBPQ}: {known[LIBPQ]}; {PQCANCEL}: {known[PQCANCEL]}; server: {server}"]
    head = [_text(MARGIN, 36, "What a cancel costs: libpq 18 and pqcancel", size=19, weight="600")]
    head += [_text(MARGIN, 58 + 16 * i, line, PALE, 11) for i, line in enumerate(lines)]
    x = MARGIN
    for name, colour in ((LIBPQ, THEIRS), (PQCANCEL, OURS)):
        head += [f'<rect x="{x}" y="86" width="12" height="12" fill="{colour}"/>', _text(x + 18, 97, name)]
        x += 100
    head += [f'<rect x="{x}" y="85" width="2" height="14" fill="{GOAL}"/>', _text(x + 8, 97, "goal: no longer than to here")]
    return head


def _row(y: int, label: str, figure: Figure, goal: Goal | None) -> list[str]:
    """Two bars, the numbers beside them, and the ratio at the end."""
    left = MARGIN + LABELS
    unit = FULL / MOST
    stroke = min(goal.limit, MOST) * unit if goal and goal.kind == RATIO else 0.0
    parts = [_text(left - 12, y + BAR + 6, label, anchor="end")]
    for i, (side, share, colour) in enumerate(((LIBPQ, 1.0, THEIRS), (PQCANCEL, figure.ratio() or 0.0, OURS))):
        top = y + i * (BAR + GAP)
        length = max(1.5, min(share, MOST) * unit)
        parts.append(f'<rect x="{left}" y="{top}" width="{length:.1f}" height="{BAR}" fill="{colour}" rx="1.5"/>')
        number = written(figure.samples[side].median, figure.unit)
        after = length + 6
        if stroke and side == PQCANCEL and after - 4 < stroke < after + 60:  # not across the number
            after = stroke + 6
        parts.append(_text(round(left + after), top + BAR - 2, number, PALE if side == LIBPQ else INK, 11))
    if stroke:
        x = left + stroke
        parts.append(f'<rect x="{x - 1:.1f}" y="{y + BAR}" width="2" height="{BAR + 2 * GAP}" fill="{GOAL}"/>')
    colour = GOAL if goal and goal.kind == RATIO and figure.ratio() > goal.limit else INK
    parts.append(_text(WIDTH - MARGIN, y + BAR + 6, f"× {shown_ratio(figure.ratio())}", colour, weight="600", anchor="end"))
    return parts


def _text(x: int, y: int, text: str, fill: str = INK, size: int = 13, weight: str = "400", anchor: str = "start") -> str:
    return (f'<text x="{x}" y="{y}" fill="{fill}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">'
            f"{escape(text)}</text>")
