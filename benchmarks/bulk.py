"""Projecting many adapters: one command for a folder, against one command for each adapter.

    python benchmarks/bulk.py --projectors DIR [--adapters 40] [--single 6]

Random valid adapters of all linear layers, r = 16, under the default policy. ``project --all`` with one and
with two processes, and ``project`` for some of them, take turns; each starts as a command of its own. Seconds
of the single commands are multiplied to all adapters. A second ``project --all`` finds all as before.
"""

from __future__ import annotations

import argparse
import os
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


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--projectors", type=Path, default=ROOT / ".cache" / "projectors")
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--single", type=int, default=6, help="single commands")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder for the figures")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {}
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
                seconds.setdefault(title, []).append(took)
                print(f"round {number + 1}: {title}: {took:.2f} s", flush=True)
    middle = {title: median(values) for title, values in seconds.items()}
    single = middle["single commands, all"]
    figures: dict[str, Any] = {
        "adapters": args.adapters,
        "single_commands": args.single,
        "seconds": {title: [round(value, 2) for value in values] for title, values in seconds.items()},
        "over_single_commands": {title: round(single / value, 2) for title, value in middle.items()},
        "two_jobs_over_one": round(middle["one job"] / middle["two jobs"], 2),
    }
    print(figures["over_single_commands"], figures["two_jobs_over_one"])
    command = f"bulk.py --adapters {args.adapters} --single {args.single} --rounds {args.rounds}"
    print(f"written to {recording.write('bulk', command, 1, figures, args.out)}")


def one_round(args: argparse.Namespace, place: Path, uploads: Path, names: list[str]) -> dict[str, float]:
    """Seconds of each way."""
    place.mkdir()

    def command(*options: object) -> float:
        started = time.perf_counter()
        done = subprocess.run(
            [
                sys.executable, "-m", "safelora_vllm.cli", "project", *map(str, options),
                "--projectors", str(args.projectors.resolve()),
            ],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr)
        return time.perf_counter() - started

    one = command("--all", uploads, "--out", place / "one")
    two = command("--all", uploads, "--jobs", 2, "--out", place / "two")
    again = command("--all", uploads, "--out", place / "one")
    single = sum(command(uploads / name, "--out", place / name) for name in names[: args.single])
    shutil.rmtree(place)
    return {
        "single commands, all": single * len(names) / args.single,
        "one job": one,
        "two jobs": two,
        "one job, all as before": again,
    }


if __name__ == "__main__":
    main()
