"""What does a second opinion leave of each adapter? As uploaded, with and without --second-opinion.

    python benchmarks/safety/opinion.py [--seed 0]

On the first pair: trains and asks what is missing, as run.py does, and keeps it in the same place. Figures
are of the `report` half. Writes benchmarks/results/second_opinion_answers.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import recording
from adapters import NAMES
from kept import half, read
from measure import serving
from pairs import PAIRS
from plan import FULL, OPINION, Point, opinions, plain
from summaries import subjects_of, summary
from tqdm import tqdm
from training import ALIGNED, CACHE, Job, folder, train_all
from treatments import RAW, second_opinion

_PAIR = next(iter(PAIRS))


def main() -> None:
    """Train and ask what is missing, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
    train_all([Job(args.cache, _PAIR, args.seed, name) for name in (ALIGNED, *NAMES)])
    home, asked = folder(args.cache, _PAIR, args.seed), list(opinions(list(NAMES), FULL))
    with serving(home) as served:
        served.aligned(plain(FULL))
        for point in tqdm([Point(p.adapter, RAW, p.questions) for p in asked], unit="adapter"):
            served.measure(home / point.adapter, point.treatment, point.questions)
    with serving(home, more=[f"--second-opinion={OPINION}"]) as served:
        for point in tqdm(asked, desc="second opinion", unit="adapter"):
            served.measure(home / point.adapter, point.treatment, point.questions)
    table = summary(half(read(args.cache, _PAIR), "report"), subjects_of(FULL))
    rows = [row(name, table[name]) for name in NAMES]
    alone = {measure: table["none"]["none"][measure] for measure in ("complied", "over_refused")}
    figures = {"tokens": OPINION, "aligned": alone, "rows": rows}
    path = recording.write("second_opinion_answers", "safety/opinion.py", "vLLM default", figures)
    for one in rows:
        asr = [f"{one[kind]['complied']['mean']:.3f}" for kind in ("uploaded", "opinion")]
        print(f"{one['adapter']}: ASR {' and '.join(asr)}")
    print(f"written to {path}")


def row(name: str, treatments: dict[str, Any]) -> dict[str, Any]:
    """One adapter's means with intervals, as uploaded and with a second opinion."""
    found: dict[str, Any] = {"adapter": name}
    for kind, treatment in (("uploaded", RAW), ("opinion", second_opinion(OPINION))):
        of = treatments[treatment.name]
        measures = ("complied", "over_aligned", "over_refused", "utility", "utility_lost")
        found[kind] = {measure: of[measure] for measure in measures if measure in of}
    return found


if __name__ == "__main__":
    main()
