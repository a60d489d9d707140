"""How many round trips a cancel takes: counted by a proxy that holds every byte back for a while."""

from __future__ import annotations

import statistics

from certs import Certs
from delay import DelayingProxy
from figures import Figures
from server import Postgres
from sides import BenchError, Sides

DELAY = 0.010  # seconds, each way
CANCELS = 3
FIRST_WITH_DIRECT = 17


def measure(figures: Figures, sides: Sides, servers: dict[int, Postgres], made: Certs) -> None:
    for major, server in servers.items():
        tls = {"sslmode": "verify-full", "sslrootcert": made.ca}
        _measure(figures, sides, server, f"TLS to {major}", tls)
        if major >= FIRST_WITH_DIRECT:
            _measure(figures, sides, server, f"direct TLS to {major}", {**tls, "sslnegotiation": "direct"})
    newest = max(servers)
    _measure(figures, sides, servers[newest], f"plaintext to {newest}", {"sslmode": "disable"})


def _measure(figures: Figures, sides: Sides, server: Postgres, name: str, options: dict) -> None:
    for side in sides.both:
        with DelayingProxy(server.port, DELAY) as proxy:
            conninfo = server.conninfo(host="localhost", hostaddr=proxy.host, port=proxy.port, **options)
            lines = side.measure(conninfo, "times", "blocking", CANCELS)
            cancels = proxy.conversations[1:]  # without the session's
        counted = {conversation.round_trips for conversation in cancels}
        if len(counted) != 1:
            raise BenchError(f"{name}, {side.name}: round trips differ from cancel to cancel: {sorted(counted)}")
        figures.add(name, "round trips", "trips", side.name, counted.pop())
        figures.add(name, "wall", "s", side.name, statistics.median(int(wall) for wall, _ in lines) * 1e-9)
