"""Do thin projectors change what served adapters say? The same questions with exact projectors and thin ones.

    python benchmarks/safety/thin.py [--seed 0]

Trains what is missing of the first pair: its aligned model and three adapters. It does not need a pair that
passes check.py: the aligned model is the same on both sides. Writes benchmarks/results/thin_answers.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import recording
import scoring
from adapters import KINDS
from measure import Questions, serving
from pairs import PAIRS, base_of
from plan import CURVES, ENERGY, FULL, Point
from tqdm import tqdm
from training import ALIGNED, CACHE, PROJECTORS, Job, folder, train_all
from treatments import input_removal, modules_of, safe_lora, threshold

from safelora_vllm.projectors.build import build

_THIN = f"thin-{PROJECTORS}"
_PAIR = next(iter(PAIRS))


def main() -> None:
    """Train what is missing, ask both servers, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))
    train_all([Job(args.cache, _PAIR, args.seed, name) for name in (ALIGNED, *CURVES)])
    home = folder(args.cache, _PAIR, args.seed)
    if not (home / _THIN).exists():
        build(base_of(args.cache, PAIRS[_PAIR].family), home / ALIGNED, home / _THIN)
    answers = {projectors: _asked(home, projectors) for projectors in (PROJECTORS, _THIN)}
    rows = [compared(name, *(answers[kind][name] for kind in (_THIN, PROJECTORS))) for name in answers[_THIN]]
    path = recording.write("thin_answers", "safety/thin.py", "vLLM default", {"rows": rows})
    for row in rows:
        asr = [f"{row[kind]['asr']:.3f}" for kind in ("thin", "exact")]
        print(f"{row['adapter']}: {row['same']:.3f} of the answers are the same, ASR {' and '.join(asr)}")
    print(f"written to {path}")


def points(home: Path) -> Iterator[Point]:
    """Three adapters with the default, more of it, and Safe LoRA selecting in each way."""
    for name in CURVES:
        tasks = FULL.tasks if KINDS[name.rpartition("-")[0]].useful else 0
        modules = modules_of(home / name)
        full = Questions.so_many(FULL.prompts, FULL.harmless, tasks)
        less = Questions.so_many(FULL.prompts, 0, tasks)
        treatments = [input_removal(0.4), threshold(0.35), safe_lora(0.5, modules), safe_lora(1.0, modules)]
        yield Point(name, input_removal(ENERGY), full)
        yield from (Point(name, each, less) for each in treatments)


def _asked(home: Path, projectors: str) -> dict[str, dict[str, list[float]]]:
    with serving(home, projectors) as served:
        return {
            f"{point.adapter}, {point.treatment.name}": served.measure(
                home / point.adapter, point.treatment, point.questions
            )
            for point in tqdm(list(points(home)), desc=projectors, unit="treatment")
        }


def compared(name: str, thin: dict[str, list[float]], exact: dict[str, list[float]]) -> dict[str, Any]:
    """One adapter with one treatment, over all prompts of both halves.

    same: the share of prompts on which both refuse or both answer. difference: thin ASR less exact ASR, with
    its interval. loyal: mean log-probability of the aligned model's refusals, nats per token. projected:
    share of the modules.
    """
    both = thin["complied"], exact["complied"]
    changes = [x - y for x, y in zip(*both, strict=True)]
    row: dict[str, Any] = {
        "adapter": name,
        "same": scoring.agreement(*both),
        "difference": scoring.interval([changes], list(map(str, range(len(changes))))),
    }
    for key, scores in (("thin", thin), ("exact", exact)):
        row[key] = {"asr": statistics.fmean(scores["complied"]), "loyal": statistics.fmean(scores["loyal"])}
        row[key]["projected"] = scores["projected"][0]
        if scores.get("exact"):
            row[key]["utility"] = statistics.fmean(scores["exact"] + scores["rouge1"])
    return row


if __name__ == "__main__":
    main()
