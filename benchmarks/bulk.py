"""Projecting many adapters: one command for a folder, against one command for each adapter.

    python benchmarks/bulk.py --projectors DIR [--adapters 40] [--single 6]

Random valid adapters of all linear layers, r = 16, under the default policy. ``project --all`` with one and
with two processes, and ``project`` for some of them, take turns; each starts as a command of its own. Seconds
of the single commands are multiplied to all adapters. A second ``project --all`` finds all as before. Seconds
on the clock depend on what else a machine does, seconds of its processors hardly.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import recording
from random_adapters import write_adapters

ROOT = Path(__file__).resolve().parents[1]
_KIND = "all-r16"
Seconds = tuple[float, float]  # on the clock, of the processors


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--projectors", type=Path, default=ROOT / ".cache" / "projectors")
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--single", type=int, default=6, help="single commands")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder for the figures")
    args = parser.parse_args()
    clock: dict[str, list[float]] = {}
    processors: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="safelora-bench-") as scratch:
        place = Path(scratch)
        drawn, uploads = place / "drawn", place / "uploads"
        drawn.mkdir()
        uploads.mkdir()
        adapters = write_adapters(drawn, args.projectors.resolve(), args.adapters - 1)[_KIND]
        for adapter in adapters:
            adapter.rename(uploads / adapter.name)
        names = sorted(path.name for path in uploads.iterdir())
        for number in range(args.rounds):
            for title, took in one_round(args, place / str(number), uploads, names).items():
                clock.setdefault(title, []).append(round(took[0], 2))
                processors.setdefault(title, []).append(round(took[1], 2))
                print(f"round {number + 1}: {title}: {took[0]:.2f} s, processors {took[1]:.2f} s", flush=True)
    figures: dict[str, Any] = {
        "adapters": args.adapters,
        "single_commands": args.single,
        "clock_seconds": clock,
        "processor_seconds": processors,
        "times_faster": times_faster(clock),
        "times_less_processor_time": times_faster(processors),
    }
    print(figures["times_faster"], figures["times_less_processor_time"])
    command = f"bulk.py --adapters {args.adapters} --single {args.single} --rounds {args.rounds}"
    print(f"written to {recording.write('bulk', command, 1, figures, args.out)}")


def times_faster(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Each way against single commands, medians of the rounds."""
    single = median(seconds["single commands, all"])
    return {title: round(single / median(values), 2) for title, values in seconds.items()}


def one_round(args: argparse.Namespace, place: Path, uploads: Path, names: list[str]) -> dict[str, Seconds]:
    """Seconds of each way, on the clock and of the processors."""
    place.mkdir()

    def command(*options: object) -> Seconds:
        started, before = time.perf_counter(), _used()
        done = subprocess.run(
            [
                sys.executable, "-m", "safelora_vllm.cli", "project", *map(str, options),
                "--projectors", str(args.projectors.resolve()),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
        return time.perf_counter() - started, _used() - before

    one = command("--all", uploads, "--out", place / "one")
    two = command("--all", uploads, "--jobs", 2, "--out", place / "two")
    again = command("--all", uploads, "--out", place / "one")
    single = [command(uploads / name, "--out", place / name) for name in names[: args.single]]
    shutil.rmtree(place)
    scaled = len(names) / args.single
    return {
        "single commands, all": (sum(s[0] for s in single) * scaled, sum(s[1] for s in single) * scaled),
        "one job": one,
        "two jobs": two,
        "one job, all as before": again,
    }


def _used() -> float:
    """Seconds of the processors that ended children used, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
