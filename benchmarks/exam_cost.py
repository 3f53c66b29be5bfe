"""What others feel of an exam: the token gaps of a stream while adapters are loaded, with and without one.

    python benchmarks/exam_cost.py [--rounds 3] [--turns 2] [--adapters 2] [--quick]

Two guarded servers with the same policy, one with ``--exam enforce`` and one with ``--exam off``. One runs at
a time, and they take turns. Each adapter is random, valid and new to the server, and passes on the first
rung: a load is one exam. A stream of another client runs quietly for some seconds, then adapters are loaded
one after another. Then one is loaded with no stream. Gaps are measured by the clock on the wall and by the
time for which the engine has a processor, in which other work on the machine is not.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import recording
from hot_load import Times, load_all, storm
from random_adapters import write_adapters
from recording import POINTS, quantile
from rich.console import Console
from rich.table import Table
from servers import Server, running
from tqdm import tqdm

EXAMS = ("off", "enforce")
_CACHE = Path(__file__).resolve().parent.parent / ".cache"
_KIND = "qv-r8"
_POLICY = ("--method=input-removal", "--energy=0.2")
# With this threshold every adapter passes on the first rung.
_OPTIONS = {"off": (), "enforce": ("--exam=enforce", "--exam-threshold=1000")}
_SUMS = re.compile(r"^safelora_exam_seconds_(sum|count) (\S+)$", re.MULTILINE)
_QUIET_SECONDS = 8.0
_BUSY_SECONDS = 0.5  # of a thread that computes
_CLOCKS = {"gap": "gap", "processor": "gap by clock"}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--aligned", type=Path, default=_CACHE / "models" / "aligned")
    parser.add_argument("--projectors", type=Path, default=_CACHE / "projectors")
    parser.add_argument("--quick", action="store_true", help="one round: a smoke test, no result")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each server (default 3)")
    parser.add_argument("--turns", type=int, default=2, help="streams of each start (default 2)")
    parser.add_argument("--adapters", type=int, default=2, help="loaded beside each stream (default 2)")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder of the JSON")
    args = parser.parse_args()
    rounds, turns, each = (1, 1, 1) if args.quick else (args.rounds, args.turns, args.adapters)
    found: dict[str, list[Times]] = {exam: [] for exam in EXAMS}
    loads: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        adapters = write_adapters(Path(scratch), args.projectors, turns * (each + 1), [_KIND])[_KIND]
        for number in tqdm(range(rounds), unit="round"):
            for exam in EXAMS if number % 2 == 0 else EXAMS[::-1]:
                with (
                    tempfile.TemporaryDirectory(dir=scratch) as own,
                    running(
                        "guarded", args.aligned, args.projectors, Path(own), [], (*_POLICY, *_OPTIONS[exam])
                    ) as server,
                ):
                    load_all(server, adapters[:1])
                    for start in range(1, len(adapters), each + 1):
                        found[exam].append(turn(server, adapters[start : start + each + 1]))
                        loads.append(os.getloadavg()[0])
    figures = summarise(found) | {
        "rounds": rounds,
        "turns": turns,
        "adapters": each,
        "processors_used": len(os.sched_getaffinity(0)),
        "load_average_of_turns": loads,
    }
    show(figures)
    command = f"exam_cost.py --rounds {rounds} --turns {turns} --adapters {each}" + " --quick" * args.quick
    print(f"written to {recording.write('exam_cost', command, 'vLLM', figures, args.out)}")


def turn(server: Server, folders: list[Path]) -> Times:
    """What one server is asked in a turn: seconds by measure. The last folder is loaded without a stream."""
    times: Times = defaultdict(list)
    before = exams(server)
    storm(server, folders[:-1], times, _QUIET_SECONDS, engine_time(server))
    between = exams(server)
    times["load alone"] = load_all(server, folders[-1:])
    after = exams(server)
    for name, (begun, ended) in {"exam, stream": (before, between), "exam, alone": (between, after)}.items():
        if count := ended[1] - begun[1]:
            times[name] = [(ended[0] - begun[0]) / count]
    return times


def engine_time(server: Server) -> Callable[[], float]:
    """A clock that runs while the engine has a processor: what else the machine does is not in it."""
    parent = psutil.Process(server.process.pid)
    engine = [child for child in parent.children(recursive=True) if child.name().startswith("VLLM::")]
    files = [
        Path(f"/proc/{process.pid}/task/{thread.id}/schedstat")
        for process in engine
        for thread in process.threads()
        if thread.user_time + thread.system_time > _BUSY_SECONDS
    ]
    return lambda: sum(int(file.read_text().split()[0]) for file in files) / 1e9


def exams(server: Server) -> tuple[float, float]:
    """The seconds of all exams so far, and their number; none where there is no exam."""
    sums = {part: float(value) for part, value in _SUMS.findall(server.metrics())}
    return sums.get("sum", 0.0), sums.get("count", 0.0)


def summarise(found: dict[str, list[Times]]) -> dict[str, Any]:
    """Each turn's values by server, their medians, and ratios, each of the medians of the turns."""
    rows: dict[str, Any] = {}
    for clock, key in _CLOCKS.items():
        for point, share in POINTS.items():
            of_turns = {
                exam: {
                    when: [quantile(times[f"{key}, {part}"], share) for times in found[exam]]
                    for when, part in (("quiet", "quiet"), ("loads", "storm"))
                }
                for exam in EXAMS
            }
            middle = {exam: {when: median(of) for when, of in of_turns[exam].items()} for exam in EXAMS}
            rows[f"{clock} {point}"] = {
                "seconds": middle,
                "seconds_of_turns": of_turns,
                "loads_over_quiet": {exam: middle[exam]["loads"] / middle[exam]["quiet"] for exam in EXAMS},
                "enforce_over_off": middle["enforce"]["loads"] / middle["off"]["loads"],
            }
    seconds = {
        name: {exam: [value for times in found[exam] for value in times[name]] for exam in EXAMS}
        for name in ("load alone", "during stream", "exam, alone", "exam, stream")
    }
    gaps = {exam: sum(len(times["gap, storm"]) for times in found[exam]) for exam in EXAMS}
    return {"gaps": rows, "gaps_while_loading": gaps, "seconds": seconds}


def show(figures: dict[str, Any]) -> None:
    """Print a table of the gaps, and how long exams took."""
    table = Table(caption="medians of the turns; loads / quiet: of the same server")
    for heading in (
        "token gap",
        "off, quiet\nms",
        "off, loads\nms",
        "enforce, quiet\nms",
        "enforce, loads\nms",
    ):
        table.add_column(heading, justify="left" if heading == "token gap" else "right")
    for heading in ("loads / quiet,\noff", "loads / quiet,\nenforce", "enforce / off"):
        table.add_column(heading, justify="right")
    for name, row in figures["gaps"].items():
        cells = [row["seconds"][exam][when] for exam in EXAMS for when in ("quiet", "loads")]
        ratios = [*(row["loads_over_quiet"][exam] for exam in EXAMS), row["enforce_over_off"]]
        table.add_row(name, *(f"{1000 * cell:.0f}" for cell in cells), *(f"{ratio:.2f}" for ratio in ratios))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for name in ("exam, alone", "exam, stream"):
        print(name, *(f"{value:.1f} s" for value in figures["seconds"][name]["enforce"]))


if __name__ == "__main__":
    main()
