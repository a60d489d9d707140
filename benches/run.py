#!/usr/bin/env python3
"""What cancels cost: libpq 18's own, and pqcancel's over the same libpq 18, side by side in one run.

    benches/run.py            everything; some minutes
    benches/run.py --quick    the same with few repetitions: to see that it works, not to be believed

One C program (measure.c) is compiled once and linked twice. It runs over the one and the other in alternation, each time as
a new process, against private servers on this machine. Figures are medians of rounds, with their quartiles; none is left
out. What counts most is the client's own processor time: the server, which does most of the work of a cancel here, has no
part in it. Nothing is pinned to a processor. Run it on a quiet machine; the report says whether it was.

    sides.py       compiles and links the program; libpqs on other OpenSSLs
    cancels.py     one cancel of each kind: time, instructions, allocations, system calls; its steps; many at once
    distances.py   round trips
    preloading.py  pgbench, and the start of small programs, with the preload
    goals.py       what is to be reached
    figures.py     statistics, and how numbers are written
    report.py      the tables; chart.py the chart; machine.py what it all ran on

Prints tables, and writes pqcancel.svg (a chart) and pqcancel.json (all figures) into target/bench. The exit status is 0 also
where a goal is missed, and 1 where something did not work. strace and valgrind are used if they are there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "c-tests")]

import cancels  # noqa: E402
import certs  # noqa: E402
import chart  # noqa: E402
import distances  # noqa: E402
import machine  # noqa: E402
import peers  # noqa: E402
import preloading  # noqa: E402
import sides  # noqa: E402
from figures import Figures  # noqa: E402
from report import Report  # noqa: E402
from server import Postgres  # noqa: E402

SETTINGS = {"log_connections": "off", "shared_buffers": "64MB"}
BUNDLES = ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"]


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        bench(arguments)
        return 0
    except (sides.BenchError, peers.PeerError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130


def interrupt(_number: int, _frame) -> None:
    raise KeyboardInterrupt


def parse_arguments() -> argparse.Namespace:
    target = ROOT / os.environ.get("CARGO_TARGET_DIR", "target")
    library = target / "release" / "libpqcancel.so"
    parser = argparse.ArgumentParser(description="Compares what cancels cost over libpq 18 and over pqcancel.")
    parser.add_argument("--quick", action="store_true", help="few repetitions: a test of the benchmark itself")
    parser.add_argument("--lib", type=Path, default=Path(os.environ.get("PQCANCEL_LIB", library)),
                        help="the library (default: PQCANCEL_LIB, else target/release)")
    parser.add_argument("--output", type=Path, default=target / "bench", help="where programs, chart and figures go")
    return parser.parse_args()


def bench(arguments: argparse.Namespace) -> None:
    began, library, quick = time.monotonic(), arguments.lib.absolute(), arguments.quick
    amount = cancels.QUICK if quick else cancels.FULL
    figures, quiet = Figures(), machine.Quiet()
    compared = sides.make(library, arguments.output)
    remarks = [*compared.remarks]
    quiet.look()
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pqcancel-bench-")))
        made = certs.make(home / "certs")
        servers = start_servers(stack, made, amount, quick)
        bundle, machine_cas = home / "bundle.crt", find_machine_cas()
        roots = cancels.make_bundle(bundle, machine_cas, made.ca)
        transports = cancels.transports(servers[max(servers)], made, bundle)
        description = machine.describe(compared, library, transports[0].conninfo) + [
            ("servers", "; ".join(map(machine.server_version, servers.values()))),
            ("CA bundle", f"{roots} certificates: {machine_cas} and the test's own"),
            ("pgbench", machine.pgbench_version()),
        ]
        for name, value in description:
            print(f"{name}: {value}")
        cancels.wait_until_settled(bundle)
        measure_cancels(figures, compared, transports, amount)
        measure_preload(figures, library, transports[0].conninfo, preloading.QUICK if quick else preloading.FULL)
        with telling("round trips"):
            distances.measure(figures, compared, servers, made)
        with telling("one cancel: counts"):
            remarks += cancels.measure_counts(figures, compared, transports, amount)
    quiet.look()
    remarks.append(quiet.verdict())
    if quick:
        remarks.append("This was a quick run: its figures are not to be believed.")
    print("", Report(figures, compared, amount.crowd).text(), *remarks, sep="\n")
    write_files(arguments.output, figures, description, remarks, amount.crowd)
    print(f"{time.monotonic() - began:.0f} seconds; chart and figures: {arguments.output}/pqcancel.svg and pqcancel.json")


@contextmanager
def telling(what: str):
    """That it is going on, and how long it took."""
    began = time.monotonic()
    print(f"measuring {what} ...", end="", flush=True)
    yield
    print(f" {time.monotonic() - began:.0f} s")


def measure_cancels(figures: Figures, compared: sides.Sides, transports: list[cancels.Transport],
                    amount: cancels.Amount) -> None:
    with telling("one cancel: time"):
        cancels.measure_times(figures, compared, transports, amount)
    with telling("the first cancel"):
        cancels.measure_steps(figures, compared, transports, amount)
    with telling(f"{amount.crowd} at once"):
        cancels.measure_crowd(figures, compared, transports[0], amount)
    with telling("what is without I/O"):
        cancels.measure_pairs(figures, compared, transports, amount)


def measure_preload(figures: Figures, library: Path, conninfo: str, amount: preloading.Amount) -> None:
    with telling("pgbench"):
        preloading.measure_pgbench(figures, library, conninfo, amount)
    with telling("starts and memory"):
        preloading.measure_starts(figures, library, amount)
        preloading.measure_memory(figures, library, amount)


def find_machine_cas() -> Path:
    for path in map(Path, BUNDLES):
        if path.exists():
            return path
    raise sides.BenchError("the machine has no CA bundle: install ca-certificates")


def start_servers(stack: ExitStack, made: certs.Certs, amount: cancels.Amount, quick: bool) -> dict[int, Postgres]:
    """By major version. All but the newest are for the round trips only."""
    prefixes = [peers.postgres_system(), *([] if quick else [peers.postgres(17)]), peers.postgres18()]
    servers = {}
    for prefix in prefixes:
        many = {"max_connections": str(amount.crowd + 100)} if prefix == prefixes[-1] else {}
        server = stack.enter_context(Postgres(prefix, made, settings={**SETTINGS, **many}))
        servers[int((server.data / "PG_VERSION").read_text())] = server
    return servers


def write_files(directory: Path, figures: Figures, description: list[tuple[str, str]], remarks: list[str], crowd: int) -> None:
    everything = {"description": dict(description), "remarks": remarks, "crowd": crowd,
                  "figures": [figure.as_json() for figure in figures.all.values()]}
    (directory / "pqcancel.json").write_text(json.dumps(everything, indent=1) + "\n")
    (directory / "pqcancel.svg").write_text(chart.draw(figures, description, remarks, crowd))


if __name__ == "__main__":
    sys.exit(main())
