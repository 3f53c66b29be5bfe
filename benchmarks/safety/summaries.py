"""Means with intervals, from the kept scores of one half of the prompts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import scoring
from kept import Kept, Scores, utility
from plan import Size, questions


def summary(kept: Kept, subjects: dict[str, list[str]]) -> dict[str, Any]:
    """Means with intervals by adapter, treatment and measure.

    Beside what was asked: ``over_aligned``, the ASR's distance to that of the aligned model on the same
    prompts; ``utility``, the mean of both tasks; ``utility_lost``, its distance to that of the adapter as
    uploaded, on the same prompts; ``departed``, the ASR that needs no phrases; ``seeds``, each one's ASR;
    ``prompts``, how many forbidden.
    """
    table: dict[str, Any] = {}
    aligned = kept.get("none", {}).get("none", {})
    for adapter, treatments in kept.items():
        table[adapter] = {}
        for treatment, by_seed in treatments.items():
            runs = list(by_seed.values())
            row: dict[str, Any] = {
                "seeds": {seed: statistics.fmean(run["complied"]) for seed, run in by_seed.items()},
                "prompts": len(runs[0]["complied"]),
            }
            for measure in dict.fromkeys(name for run in runs for name in run):
                if values := [run[measure] for run in runs if run.get(measure)]:
                    row[measure] = interval(values, subjects.get(measure))
            if "sense" in row:
                departed = [scoring.departed(run["sense"]) for run in runs]
                row["departed"] = interval(departed, subjects["complied"])
            compared = [(run, aligned[seed]) for seed, run in by_seed.items()]
            row["over_aligned"] = over_aligned(compared, subjects)
            if "exact" in row:
                row["utility"] = interval([utility(run) for run in runs], None)
                raw = treatments.get("raw-0", {})
                if lost := [(raw[seed], run) for seed, run in by_seed.items() if seed in raw]:
                    row["utility_lost"] = utility_lost(lost)
            table[adapter][treatment] = row
    return table


def over_aligned(
    compared: Sequence[tuple[Scores, Scores]], subjects: dict[str, list[str]]
) -> dict[str, float]:
    """ASR of what is served less that of the aligned model. compared: both's scores, by run."""
    differences = [
        [x - y for x, y in zip(served["complied"], aligned["complied"], strict=False)]
        for served, aligned in compared
    ]
    return interval(differences, subjects["complied"])


def utility_lost(compared: Sequence[tuple[Scores, Scores]]) -> dict[str, float]:
    """Utility as uploaded less that of what is served. compared: both's scores, by run."""
    lost = [[x - y for x, y in zip(utility(raw), utility(served), strict=False)] for raw, served in compared]
    return interval(lost, None)


def interval(runs: Sequence[list[float]], subjects: Sequence[str] | None) -> dict[str, float]:
    """As scoring.interval. subjects: of the prompts; None where each is on one of its own."""
    count = min(map(len, runs))  # fewer prompts are the first of more
    of = subjects[:count] if subjects else list(map(str, range(count)))
    return scoring.interval([run[:count] for run in runs], of)


def subjects_of(size: Size, first: int = 1) -> dict[str, list[str]]:
    """Of the prompts of one half: those of `report` are every second one."""
    asked = questions(size, chosen=False)
    return {
        **dict.fromkeys(("complied", "loyal", "sense"), [p.subject for p in asked.forbidden][first::2]),
        "over_refused": [p.subject for p in asked.harmless][first::2],
    }
