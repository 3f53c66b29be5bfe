"""Is one method's curve below another's? ASR at equal utility, with the interval of the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import scoring
from kept import Scores, utility

UTILITIES = (0.8, 0.85, 0.9)
RULES = ("input-removal", "early-values")
OTHERS = ("safe-lora", "csulora", "scaling")
RAW = "raw-0"
_KEEPS = ("csulora",)  # a larger energy leaves more of the adapter
By = Mapping[str, Mapping[str, Scores]]  # treatment, seed


def compare(treatments: By, subjects: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By rule, other method and utility: the rule's ASR less the other's, and what that says.

    treatments: one adapter's scores of the `report` half. Seeds that lack a point of either are left out, and
    so are utilities that the adapter does not have as uploaded.
    """
    found = {rule: _against_others(rule, treatments, subjects) for rule in RULES}
    return {rule: others for rule, others in found.items() if others}


def _against_others(rule: str, treatments: By, subjects: Sequence[str]) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for other in OTHERS:
        names = [curve(treatments, method) for method in (rule, other)]
        if min(map(len, names)) < 2:
            continue
        seeds = sorted(set.intersection(*(set(treatments[name]) for each in names for name in each)), key=int)
        if not seeds:
            continue
        points = [_points(treatments, each, seeds, subjects) for each in names]
        (uploaded, _), *_ = points[0][0]
        found[other] = {}
        for at in (each for each in UTILITIES if each <= uploaded):
            differences = [asr_at(at, mine) - asr_at(at, its) for mine, its in zip(*points, strict=True)]
            low, high = np.quantile(differences[1:], (0.025, 0.975))
            figure = {"mean": differences[0], "low": float(low), "high": float(high)}
            found[other][f"{at:g}"] = {**figure, "says": says(figure), "seeds": seeds}
    return found


def curve(treatments: Mapping[str, object], method: str) -> list[str]:
    """A method's treatments, from the adapter as uploaded to the strongest one."""
    names = [name for name in treatments if name.rpartition("-")[0] == method]
    return [RAW, *sorted(names, key=strength, reverse=method in _KEEPS)] if RAW in treatments else []


def strength(treatment: str) -> float:
    """The number in a treatment's name."""
    return float(treatment.rpartition("-")[2])


def says(difference: Mapping[str, float]) -> str:
    """Whether the rule's ASR is lower, higher, or not told apart from the other's."""
    if difference["high"] < 0:
        return "lower"
    return "higher" if difference["low"] > 0 else "not told apart"


def asr_at(at: float, points: Sequence[tuple[float, float]]) -> float:
    """The lowest ASR of a curve at a utility, linear between its points.

    points: (utility, ASR), the adapter as uploaded first. Its ASR is that of all utilities above the curve,
    and the last point's ASR is that of all below.
    """
    crossed = [
        y + (other_y - y) * (at - x) / (other_x - x)
        for (x, y), (other_x, other_y) in pairwise(points)
        if min(x, other_x) <= at <= max(x, other_x) and x != other_x
    ]
    if crossed:
        return min(crossed)
    return points[0][1] if at > max(x for x, _ in points) else points[-1][1]


def _points(
    treatments: By, names: Sequence[str], seeds: Sequence[str], subjects: Sequence[str]
) -> list[list[tuple[float, float]]]:
    """A curve's points: as measured, and then of each draw of the bootstrap, the same draws for all."""
    sides = []
    for name in names:
        runs = [treatments[name][seed] for seed in seeds]
        asr = [run["complied"] for run in runs]
        useful = [utility(run) for run in runs]
        each = list(map(str, range(len(useful[0]))))
        sides.append(
            [
                np.concatenate([[np.mean(scores)], scoring.draws(scores, of)])
                for scores, of in ((useful, each), (asr, subjects[: len(asr[0])]))
            ]
        )
    return [
        [(float(x[i]), float(y[i])) for x, y in sides]
        for i in range(len(sides[0][0]))
    ]  # fmt: skip
