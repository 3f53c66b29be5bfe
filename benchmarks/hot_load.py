"""Loading adapters into a serving model: this package's guarded server against vLLM's own.

    python benchmarks/hot_load.py [--aligned DIR] [--projectors DIR] [--quick] [--rounds N]

One server runs at a time: both at once would disturb each other. They take turns, the first one changing
from round to round. Each adapter is random, valid and loaded once as new content; the guarded server
projects all of its modules. A stream of another client runs quietly for a while, then a dozen adapters are
loaded one after another, several times.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import recording
from random_adapters import KINDS, write_adapters
from recording import quantile
from rich.console import Console
from rich.table import Table
from servers import Server, running

SERVERS = ("unguarded", "guarded")
_CACHE = Path(__file__).resolve().parent.parent / ".cache"
_PROMPT = "A long list of towns, rivers and mountains, and what each of them is known for:\n1."
_FIRST_TOKENS = 8  # prefill and warm-up of a stream
Times = dict[str, list[float]]


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=Path, default=_CACHE / "models" / "base")
    parser.add_argument("--aligned", type=Path, default=_CACHE / "models" / "aligned")
    parser.add_argument("--projectors", type=Path, default=_CACHE / "projectors", help="built if missing")
    parser.add_argument("--quick", action="store_true", help="few adapters: a smoke test, no result")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each server (default 3)")
    parser.add_argument("--storms", type=int, default=3, help="dozens per kind and round (default 3)")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder of the JSON")
    parser.add_argument("options", nargs="*", help="further vLLM options, after --")
    args = parser.parse_args()
    rounds, storms, dozen = (1, 1, 3) if args.quick else (args.rounds, args.storms, 12)
    if not args.projectors.exists():
        from safelora_vllm.projectors.build import build

        build(args.base, args.aligned, args.projectors)
    results: dict[str, list[dict[str, Times]]] = {kind: [] for kind in SERVERS}
    with tempfile.TemporaryDirectory() as scratch:
        adapters = write_adapters(Path(scratch), args.projectors, dozen * (1 + storms))
        for number in range(rounds):
            for kind in SERVERS if number % 2 == 0 else SERVERS[::-1]:
                print(f"round {number + 1} of {rounds}: {kind}", file=sys.stderr)
                with (
                    tempfile.TemporaryDirectory(dir=scratch) as own,
                    running(kind, args.aligned, args.projectors, Path(own), args.options) as server,
                ):
                    results[kind].append(measure(server, adapters, dozen))
    figures = summarise(results)
    show(figures, rounds)
    command = f"hot_load.py --rounds {rounds} --storms {storms}" + " --quick" * args.quick
    path = recording.write("hot_load", command, "vLLM's default", figures | {"adapters": dozen}, args.out)
    print(f"written to {path}")


def measure(server: Server, adapters: dict[str, list[Path]], dozen: int) -> dict[str, Times]:
    """Everything that one started server is asked: {kind of adapter: {measure: seconds}}."""
    found: dict[str, Times] = {}
    for kind, folders in adapters.items():
        times: Times = defaultdict(list)
        warm, idle, rest = folders[0], folders[1 : 1 + dozen], folders[1 + dozen :]
        load_all(server, [warm])
        times["first"] = load_all(server, idle)
        times["repeated"] = load_all(server, idle)
        for start in range(0, len(rest), dozen):
            storm(server, rest[start : start + dozen], times)
        found[kind] = times
    found["stages"] = stages(server)
    return found


def load_all(server: Server, folders: list[Path]) -> list[float]:
    """Load each adapter in turn, then unload them: seconds of each load."""
    seconds = [server.load(folder.name, folder) for folder in folders]
    for folder in folders:
        server.unload(folder.name)
    return seconds


def storm(
    server: Server,
    folders: list[Path],
    times: Times,
    quiet_seconds: float = 4.0,
    clock: Callable[[], float] | None = None,
) -> None:
    """Gaps between the tokens of one stream: some quiet seconds, then while ``folders`` are loaded.

    clock: another one, by which gaps are measured, too.
    """
    moments: list[float] = []
    readings: list[float] = []
    finished = threading.Event()

    def listen() -> None:
        stream = server.tokens(_PROMPT, 2000)
        for moment in stream:
            moments.append(moment)
            if clock:
                readings.append(clock())
            if finished.is_set():
                break
        stream.close()

    listener = threading.Thread(target=listen)
    listener.start()
    while len(moments) < _FIRST_TOKENS:
        if not listener.is_alive():
            raise RuntimeError("the stream ended before its first tokens")
        time.sleep(0.01)
    time.sleep(quiet_seconds)
    start = time.perf_counter()
    times["during stream"] += [server.load(folder.name, folder) for folder in folders]
    end = time.perf_counter()
    still_running = listener.is_alive()
    finished.set()
    listener.join()
    if not still_running:
        raise RuntimeError("the stream ended during the loads; its gaps would be too few")
    for folder in folders:
        server.unload(folder.name)
    for name, read in {"gap": moments, "gap by clock": readings}.items():
        gaps = [after - before for before, after in pairwise(read)]
        about = list(zip(pairwise(moments), gaps, strict=False))[_FIRST_TOKENS - 1 :]
        times[f"{name}, quiet"] += [gap for (_, b), gap in about if b <= start]
        times[f"{name}, storm"] += [gap for (a, b), gap in about if b > start and a < end]


def stages(server: Server) -> Times:
    """The guarded server's own mean seconds per stage of the gate; empty for the other one."""
    pattern = r'safelora_stage_seconds_(sum|count)\{stage="(\w+)"\} (\S+)'
    sums: dict[str, dict[str, float]] = defaultdict(dict)
    for part, stage, value in re.findall(pattern, server.metrics()):
        sums[stage][part] = float(value)
    return {stage: [parts["sum"] / parts["count"]] for stage, parts in sums.items()}


def summarise(results: dict[str, list[dict[str, Times]]]) -> dict[str, Any]:
    """Per kind of adapter and measure: each round's value per server, and the ratio of their medians."""
    measures = {
        "first load": ("first", 0.5),
        "repeated load": ("repeated", 0.5),
        "load during a stream": ("during stream", 0.5),
        "token gap p50, quiet": ("gap, quiet", 0.5),
        "token gap p99, quiet": ("gap, quiet", 0.99),
        "token gap p50, storm": ("gap, storm", 0.5),
        "token gap p99, storm": ("gap, storm", 0.99),
    }
    figures: dict[str, Any] = {}
    for kind, title in KINDS.items():
        rows: dict[str, dict[str, Any]] = {}
        for name, (key, share) in measures.items():
            per_round = {
                server: [quantile(found[kind][key], share) for found in results[server]] for server in SERVERS
            }
            middle = {server: median(values) for server, values in per_round.items()}
            rows[name] = {
                "seconds": middle,
                "seconds_of_rounds": per_round,
                "samples": {server: sum(len(r[kind][key]) for r in results[server]) for server in SERVERS},
                "guarded_over_unguarded": middle["guarded"] / middle["unguarded"],
            }
        for point in ("p50", "p99"):
            busy, calm = (rows[f"token gap {point}, {when}"] for when in ("storm", "quiet"))
            busy["storm_over_quiet"] = {s: busy["seconds"][s] / calm["seconds"][s] for s in SERVERS}
        figures[kind] = {"title": title, "measures": rows}
    gate = results["guarded"]
    means = {stage: median(found["stages"][stage][0] for found in gate) for stage in gate[0]["stages"]}
    return {"kinds": figures, "gate_stage_mean_seconds": means}


def show(figures: dict[str, Any], rounds: int) -> None:
    """Print a table per kind of adapter."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    for found in figures["kinds"].values():
        table = Table(
            title=found["title"],
            caption=f"medians of {rounds} round(s); × quiet: the storm's gap over the quiet one, per server",
        )
        table.add_column("measure")
        headings = (
            "unguarded\nms",
            "guarded\nms",
            "guarded /\nunguarded",
            "× quiet,\nunguarded",
            "× quiet,\nguarded",
        )
        for heading in headings:
            table.add_column(heading, justify="right")
        for name, row in found["measures"].items():
            calm = row.get("storm_over_quiet", {})
            table.add_row(
                name,
                *(f"{1000 * row['seconds'][server]:.1f}" for server in SERVERS),
                f"{row['guarded_over_unguarded']:.2f}",
                *(f"{calm[server]:.2f}" if calm else "" for server in SERVERS),
            )
        console.print(table)


if __name__ == "__main__":
    main()
