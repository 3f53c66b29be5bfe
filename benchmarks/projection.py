"""Judging and projecting one adapter at Llama-2-7B's shapes: the released algorithm against this package.

    python benchmarks/projection.py [--quick] [--threads N] [--repeats N]

Every contender is a process of its own that holds the projectors of a few real layers, more than a
processor's cache: each module's projector comes out of memory. They take turns on the same adapters, in an
order that rotates. Seconds and bytes of the projectors are scaled to 32 layers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import recording
from contenders import RELEASED
from rich.console import Console
from rich.table import Table
from synthetic import LAYERS, Case, cases, write_case
from tqdm import tqdm

THRESHOLDS = (0.35, 0.5)
_MIB, _GIB = 2**20, 2**30


@dataclass
class Contender:
    """A running contender and what it answered. ``runs`` has one answer per measured repetition."""

    kind: str
    process: subprocess.Popen[str]
    held: dict[str, int] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"contender {self.kind} ended with code {self.process.wait()}")
        return dict(json.loads(line))

    def ask(self, adapter: int) -> dict[str, Any]:
        """Let it judge an adapter."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{adapter}\n")
        self.process.stdin.flush()
        return self.read()


def main() -> None:
    """Measure all cases, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="sides divided by 8: a smoke test, no result")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides (default 1)")
    parser.add_argument("--repeats", type=int, default=8, help="measured adapters per contender (default 8)")
    parser.add_argument("--scratch", type=Path, help="folder for about 6 GB of projectors (default: /tmp)")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder of the JSON")
    args = parser.parse_args()
    figures = {}
    for key, case in cases(args.quick).items():
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            print(f"drawing {case.layers} layer(s) of {case.title}", file=sys.stderr)
            write_case(Path(scratch), case, args.repeats)
            figures[key] = measure(Path(scratch), case, args.threads, args.repeats)
        show(case, figures[key], args.threads)
    command = f"projection.py --threads {args.threads} --repeats {args.repeats}" + " --quick" * args.quick
    path = recording.write("projection", command, args.threads, {"cases": figures}, args.out)
    print(f"written to {path}")


def measure(folder: Path, case: Case, threads: int, repeats: int) -> dict[str, Any]:
    """All contenders on all adapters of one case; the first round only warms up."""
    kinds = [RELEASED, *(f"{form}-{dtype}" for form, dtype in case.forms)]
    contenders = []
    try:
        for kind in kinds:
            contenders.append(Contender(kind, _start(kind, folder, threads)))
            contenders[-1].held = contenders[-1].read()
        for contender in contenders:
            contender.ask(0)
        for index in tqdm(range(repeats), desc=case.title, unit="adapter"):
            turn = index % len(contenders)
            for contender in contenders[turn:] + contenders[:turn]:
                contender.runs.append(contender.ask(index))
    finally:
        for contender in contenders:
            contender.process.kill()
            contender.process.wait()
    truth = [json.loads((folder / f"truth-{index}.json").read_text()) for index in range(repeats)]
    rows = {contender.kind: _figures(contender, case, truth) for contender in contenders}
    slowest = rows[RELEASED]["seconds"]
    for row in rows.values():
        row["times_faster"] = slowest / row["seconds"]
    similarities = [value for expected in truth for value in expected.values()]
    return {
        "title": case.title,
        "rank": case.rank,
        "shapes": case.shapes,
        "layers_measured": case.layers,
        "layers_scaled_to": LAYERS,
        "decisions": sum(map(len, truth)),
        "similarity_range": [min(similarities), max(similarities)],
        "contenders": rows,
    }


def _start(kind: str, folder: Path, threads: int) -> subprocess.Popen[str]:
    script = str(Path(__file__).with_name("contenders.py"))
    return subprocess.Popen(
        [sys.executable, script, kind, str(folder), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _figures(contender: Contender, case: Case, truth: list[dict[str, float]]) -> dict[str, Any]:
    scale = LAYERS / case.layers
    pairs = [
        (run["similarities"][name], exact)
        for run, expected in zip(contender.runs, truth, strict=True)
        for name, exact in expected.items()
    ]
    return {
        "seconds": median(run["seconds"] for run in contender.runs) * scale,
        "seconds_of_runs": [run["seconds"] * scale for run in contender.runs],
        "projector_bytes": int(contender.held["projector_bytes"] * scale),
        "resident_bytes_measured": contender.held["resident_bytes"],
        "working_bytes": max(run["working_bytes"] for run in contender.runs),
        "similarity_error_max": max(abs(found - exact) for found, exact in pairs),
        "similarity_error_median": median(abs(found - exact) for found, exact in pairs),
        "flipped": {str(t): sum((found <= t) != (exact <= t) for found, exact in pairs) for t in THRESHOLDS},
    }


def show(case: Case, figures: dict[str, Any], threads: int) -> None:
    """Print one case's table."""
    low, high = figures["similarity_range"]
    table = Table(
        title=f"{case.title}, sides {max(map(max, case.shapes.values()))} and less, "
        f"{threads} torch thread(s) on both sides",
        caption=f"{case.layers} layer(s) measured, seconds and projectors scaled to {LAYERS}; errors and "
        f"flips over {figures['decisions']} decisions (similarities {low:.2f} to {high:.2f}) against float64",
    )
    table.add_column("contender")
    for heading in ("s", "× faster", "projectors\nGiB", "work\nMiB", "max\nerror", "median\nerror"):
        table.add_column(heading, justify="right")
    for threshold in THRESHOLDS:
        table.add_column(f"flips\nτ={threshold}", justify="right")
    for kind, row in figures["contenders"].items():
        table.add_row(
            kind,
            f"{row['seconds']:.3f}",
            f"{row['times_faster']:.1f}",
            f"{row['projector_bytes'] / _GIB:.2f}",
            f"{row['working_bytes'] / _MIB:.1f}",
            f"{row['similarity_error_max']:.1e}",
            f"{row['similarity_error_median']:.1e}",
            *(str(count) for count in row["flipped"].values()),
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
