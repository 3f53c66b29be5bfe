"""Scores by adapter, treatment and seed, as a run keeps them, and the two halves of their prompts."""

from __future__ import annotations

import json
from pathlib import Path

import exam
from plan import SEEDS

Scores = dict[str, list[float]]
Kept = dict[str, dict[str, dict[str, Scores]]]  # adapter, treatment, seed
_SINGLE = ("norm", "total_norm", "projected")  # one figure a treatment, not one a prompt


def scores_of(home: Path) -> dict[str, dict[str, Scores]]:
    """All that a seed's folder has, by adapter and treatment."""
    found: dict[str, dict[str, Scores]] = {}
    for file in sorted((home / "scores").glob("*/*.json")):
        found.setdefault(file.parent.name, {})[file.stem] = json.loads(file.read_text())["scores"]
    return found


def seeds(cache: Path, pair: str) -> list[Path]:
    """Folders of the seeds that were asked about."""
    homes = (home for home in (cache / pair).glob("[0-9]*") if (home / "scores" / "none").exists())
    return sorted(homes, key=lambda home: int(home.name))


def decided_on(kept: Kept, deciding: str) -> Kept:
    """The scores of the first seed, of the aligned model and of the adapter that a rule is chosen by.

    Only there, every treatment's answers to both halves are wanted. Nothing where there are none.
    """
    first = str(SEEDS[0])
    return {
        adapter: {t: {first: by_seed[first]} for t, by_seed in kept[adapter].items() if first in by_seed}
        for adapter in ("none", deciding)
        if any(first in by_seed for by_seed in kept.get(adapter, {}).values())
    }


def half(kept: Kept, name: str) -> Kept:
    """The scores of one half of the prompts."""
    return {
        adapter: {
            treatment: {seed: half_of(scores, name) for seed, scores in by_seed.items()}
            for treatment, by_seed in treatments.items()
        }
        for adapter, treatments in kept.items()
    }


def half_of(scores: Scores, name: str) -> Scores:
    """One half of one treatment's scores."""
    take = {"choose": exam.choose, "report": exam.report}[name]
    return {m: list(v) if m in _SINGLE else take(scores, m) for m, v in scores.items()}


def utility(run: Scores) -> list[float]:
    """The mean of both tasks, prompt by prompt."""
    return [(x + y) / 2 for x, y in zip(run["exact"], run["rouge1"], strict=True)]
