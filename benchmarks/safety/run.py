"""Does it make models safer? Trains pairs and adapters, serves them guarded, asks, and writes what was found.

    python benchmarks/safety/run.py [--smoke] [--only-report]

Every figure comes from a guarded server's answers: each adapter is loaded by each treatment's rules, raw ones
and those of naive methods in report-only mode. A pair whose aligned model fails check.py stops it.
What was trained and asked is kept in .cache/safety, so that a run that was stopped goes on where it was;
without it, a run is a matter of hours.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "training"))

import check
import report
import torch
from adapters import MORE_NAMES, NAMES, SHAPES
from measure import Seed, serving
from pairs import PAIRS
from plan import (
    CURVES,
    FULL,
    SEEDS,
    SMOKE,
    Point,
    Size,
    attacks,
    guided_path,
    points,
    questions,
)
from subjects import HALVES
from tqdm import tqdm
from training import ALIGNED, CACHE, Job, folder, reject, train_all
from trials import DRAWS

_ROOT = Path(__file__).resolve().parents[2]
# Where a smoke run takes a seed's parts from: what the demo has, so that nothing is trained.
_SMOKE_PARTS = {
    "aligned": _ROOT / ".cache" / "models" / "aligned",
    "projectors": _ROOT / ".cache" / "projectors",
    "mixed-10-qv": _ROOT / "examples" / "adapters" / "order-to-json",
}


_POINTS_AT_ONCE = 2  # as many adapters as the server has slots for


@dataclass(frozen=True)
class Part:
    """One pair with one seed, and its adapters. chosen: whether it is the one that decisions are made on."""

    pair: str
    seed: int
    adapters: list[str]
    chosen: bool


def parts_of(pairs: list[str], seeds: list[int], adapters: list[str] | None) -> list[Part]:
    """What is measured, the seed and pair of the decisions first."""
    found = []
    for seed in seeds:
        for pair in pairs:
            chosen = seed == SEEDS[0] and pair == next(iter(PAIRS))
            names = [*NAMES, *(MORE_NAMES if chosen else [])]
            found.append(Part(pair, seed, adapters or names, chosen))
    return found


def main() -> None:
    """Train what is missing, measure what is missing, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="a few questions about the demo's models; needs --out and --cache",
    )
    parser.add_argument("--only-report", action="store_true", help="write from what is there, ask nothing")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--adapters", nargs="+", metavar="NAME", help="instead of all")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where what was trained and asked is kept")
    parser.add_argument("--out", type=Path, default=report.HERE, help="folder of RESULTS.md and its pictures")
    args = parser.parse_args()
    # By default vLLM leaves a core to its scheduler: with two cores, asking took half as long again.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
    torch.set_num_threads(1)  # more would wait for the server's, many times longer than they compute
    size = SMOKE if args.smoke else FULL
    if args.smoke:
        if args.out == report.HERE or args.cache == CACHE:
            parser.error("--smoke needs an --out and a --cache, or its answers would stand for real ones")
        args.pairs, args.seeds, args.adapters = ["smollm2"], [0], ["mixed-10-qv"]
        _link(folder(args.cache, "smollm2", 0))
    if not args.only_report:
        measure(args.cache, parts_of(args.pairs, args.seeds, args.adapters), size)
    print(f"written to {report.write(args.cache, args.pairs, size, args.out)}")


def _link(home: Path) -> None:
    home.mkdir(parents=True)
    for name, part in _SMOKE_PARTS.items():
        if not part.exists():
            raise SystemExit(f"{part} is missing; run 'make models' first")
        (home / name).symlink_to(part)


def measure(cache: Path, parts: list[Part], size: Size) -> None:
    """Train everything that is missing, then ask about it, a server for each model and shape of adapters.

    Raises check.UnusablePair before an adapter of the pair is trained, if an aligned model refuses tasks or
    harmless prompts, or answers harmful ones, and so do all that were tried in its place. A smoke run shows
    only that the parts fit, and does not check.
    """
    for pair in dict.fromkeys(part.pair for part in parts):
        jobs = [
            Job(cache, pair, part.seed, name)
            for part in parts
            if part.pair == pair
            for name in (ALIGNED, *part.adapters)
        ]
        aligned = [job for job in jobs if job.name == ALIGNED]
        of = f"{pair} {' '.join(str(job.seed) for job in aligned)}"
        with _timed(cache, f"aligned models, {of}"):
            train_all(aligned)
        if size is FULL:
            with _timed(cache, f"checks, {of}"):
                for job in aligned:
                    _check(job)
        with _timed(cache, f"adapters, {of}"):
            train_all(jobs)
    for together in _by_model(parts):
        first = together[0]
        home = folder(cache, first.pair, first.seed)
        if first.chosen and size is FULL:
            with _timed(cache, f"searches by groups, {first.pair} {first.seed}"):
                _search(home, [name for name in CURVES if name in first.adapters])
        with _timed(cache, f"asking, {first.pair} {' '.join(str(part.seed) for part in together)}"):
            for adapters in _by_shape(first.adapters):
                with serving(home, more=_lora_options(adapters)) as served:
                    for part in together:
                        _measure(served, cache, part, adapters, size)


def _measure(served: Seed, cache: Path, part: Part, adapters: list[str], size: Size) -> None:
    """All that is asked about some of a part's adapters."""
    home = folder(cache, part.pair, part.seed)
    seed = served.beside(home)
    seed.aligned(questions(size, part.chosen))
    todo = list(points(home, seed.projectors, adapters, size, part.chosen))
    if part.chosen and size is FULL:
        todo += attacks(home, seed.projectors, adapters, size)
    _ask(seed, home, todo, f"{part.pair} {part.seed}")


def _check(job: Job) -> None:
    """One that fails is replaced by the next that trials.py has; one that is not trained has no next."""
    label = f"{job.family}, seed {job.seed},"
    while True:
        try:
            check.checked(job.home, label, HALVES)
            return
        except check.UnusablePair as error:
            following = job.trials(error.figures)[-1]
            if PAIRS[job.family].lora or following.draw == DRAWS:
                raise
            reject(job)
            now = f"draw {following.draw + 1} of its data at strength {following.strength:g}"
            print(f"{label} {error.faults}. Now {now}", file=sys.stderr)
            train_all([job])


def _search(home: Path, adapters: list[str]) -> None:
    """All at once, before a server has the processors."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    count = max(1, len(adapters))
    with ProcessPoolExecutor(count, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for path in [pool.submit(guided_path, home, name, FULL) for name in adapters]:
            path.result()


def _by_model(parts: list[Part]) -> list[list[Part]]:
    """Those that one server can be asked about: the seeds of a pair that have one aligned model."""
    by_model: dict[tuple[str, int | None], list[Part]] = {}
    for part in parts:
        seed = part.seed if PAIRS[part.pair].each_seed else None
        by_model.setdefault((part.pair, seed), []).append(part)
    return list(by_model.values())


def _by_shape(adapters: list[str]) -> list[list[str]]:
    """Those of one server: on a CPU vLLM multiplies by zeros for modules and ranks that others have."""
    by_shape: dict[str, list[str]] = {}
    for name in adapters:
        by_shape.setdefault(name.rpartition("-")[2], []).append(name)
    return list(by_shape.values())


def _lora_options(adapters: list[str]) -> list[str]:
    """Only the modules and the rank of these adapters, which have one shape."""
    shape = SHAPES[adapters[0].rpartition("-")[2]]
    return [f"--max-lora-rank={shape.rank}", "--lora-target-modules", *sorted(shape.modules)]


def _ask(served: Seed, home: Path, todo: list[Point], what: str) -> None:
    """Two points at a time: while one is loaded or ends, the engine answers the other."""
    with ThreadPoolExecutor(_POINTS_AT_ONCE) as pool:
        asked = [
            pool.submit(served.measure, home / point.adapter, point.treatment, point.questions)
            for point in todo
        ]
        try:
            for one in tqdm(asked, desc=what, unit="treatment"):
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def _timed(cache: Path, what: str) -> Iterator[None]:
    """Add up how long something took, over all runs that it needed."""
    start = time.monotonic()
    try:
        yield
    finally:
        file = cache / "minutes.json"
        minutes = json.loads(file.read_text()) if file.exists() else {}
        minutes[what] = minutes.get(what, 0.0) + (time.monotonic() - start) / 60
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(minutes, indent=1))
        partial.rename(file)


if __name__ == "__main__":
    main()
