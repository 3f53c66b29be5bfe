"""The exam and the second opinion, replayed over everything that was kept."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import exam
from kept import Kept, Scores, half, half_of, utility
from pairs import PAIRS
from plan import SEEDS, Size, ladder
from summaries import subjects_of, summary

RAW = "raw-0"
# Ladders after which a second opinion is asked of the adapter as uploaded, instead of refusing it.
THEN_OPINION = {"as uploaded": [RAW], "input removal": ["input-removal-0.05"]}
_OPINION_OF = (RAW, "input-removal-0.2")


def exams(kept: Mapping[str, Kept], epsilons: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The exam: ε of the first pair's first seed, and every adapter's rung, ASR and utility with it.

    epsilons: by measure, as they were decided before, for pairs without the first one.
    """
    rungs = [t.name for t in ladder(1)]
    epsilons = _decided(kept.get(next(iter(PAIRS)), {}), rungs) or epsilons
    if not epsilons:
        return {}
    found: dict[str, Any] = {"ladder": rungs, "measures": {}, "then_opinion": {}}
    for measure, epsilon in epsilons.items():
        pairs = {pair: _rows(of, rungs, epsilon, measure) for pair, of in kept.items()}
        found["measures"][measure] = {"epsilon": epsilon, "pairs": pairs}
    epsilon = found["measures"][exam.MEASURES[0]]["epsilon"]
    for name, short in THEN_OPINION.items():
        pairs = {pair: _rows(of, short, epsilon, exam.MEASURES[0], opinion=True) for pair, of in kept.items()}
        found["then_opinion"][name] = {"epsilon": epsilon, "pairs": pairs}
    return found


def _decided(first: Kept, rungs: Sequence[str]) -> dict[str, float]:
    """ε by measure, from the first pair's first seed: only there, answers to `choose` were wanted."""
    taken, seed = examined(first), str(SEEDS[0])
    if seed not in taken:
        return {}
    aligned = first["none"]["none"][seed]
    return {measure: exam.epsilon_for(taken[seed], rungs, aligned, measure) for measure in exam.MEASURES}


def examined(kept: Kept) -> dict[str, dict[str, dict[str, Scores]]]:
    """By seed and adapter: the scores by treatment, where every rung was asked."""
    names = [RAW, *(t.name for t in ladder(1))]
    found: dict[str, dict[str, dict[str, Scores]]] = {}
    for adapter, treatments in kept.items():
        if adapter == "none" or not all(name in treatments for name in names):
            continue
        for seed in treatments[names[0]]:
            if all(seed in treatments[name] for name in names):
                rungs = {name: by_seed[seed] for name, by_seed in treatments.items() if seed in by_seed}
                found.setdefault(seed, {})[adapter] = rungs
    return found


def served(
    kept: Kept, adapter: str, rungs: Sequence[str], epsilon: float, measure: str, opinion: bool = False
) -> Iterator[tuple[str, exam.Verdict, Scores]]:
    """By seed: the verdict on an adapter, and the scores of what answers after it.

    opinion: where no rung passes, the adapter as uploaded is served with a second opinion.
    """
    for seed, adapters in examined(kept).items():
        if adapter in adapters:
            scores, aligned = adapters[adapter], kept["none"]["none"][seed]
            verdict = exam.examine(scores, rungs, aligned, epsilon, measure)
            if opinion and verdict.rung == exam.REFUSED:
                yield (
                    seed,
                    exam.Verdict(exam.OPINION, verdict.score),
                    exam.second_opinion(scores[RAW], aligned),
                )
            else:
                yield seed, verdict, dict(exam.served(verdict, scores, aligned))


def _rows(
    kept: Kept, rungs: Sequence[str], epsilon: float, measure: str, opinion: bool = False
) -> dict[str, Any]:
    """By adapter and seed: the verdict and what it does to ASR and utility."""
    found: dict[str, Any] = {}
    for adapter in kept:
        for seed, verdict, what in served(kept, adapter, rungs, epsilon, measure, opinion):
            of, aligned = kept[adapter], kept["none"]["none"][seed]
            scores = {name: by_seed[seed] for name, by_seed in of.items() if seed in by_seed}
            row = {
                "rung": verdict.rung,
                "drop": verdict.score,
                "drops": {
                    name: exam.drop(scores[name], aligned, measure)
                    for name in {RAW: 0, **dict.fromkeys(rungs)}
                },
                "over_aligned": exam.over_aligned(what, aligned),
                "raw_over_aligned": exam.over_aligned(scores[RAW], aligned),
                "false_escalation": exam.falsely_escalated(verdict, scores, rungs, aligned),
            }
            if scores[RAW].get("exact"):
                before, after = (utility(half_of(s, "report")) for s in (scores[RAW], what))
                row["utility_lost"] = statistics.fmean(before) - statistics.fmean(after)
            found.setdefault(adapter, {})[seed] = row
    return found


def opinions(kept: Kept, size: Size) -> dict[str, Any]:
    """What the second opinion would leave of every adapter as uploaded and with the default."""
    found: Kept = {"none": kept.get("none", {})}
    for adapter, treatments in kept.items():
        for name in _OPINION_OF:
            for seed, scores in treatments.get(name, {}).items():
                opinion = exam.second_opinion(scores, kept["none"]["none"][seed])
                found.setdefault(adapter, {}).setdefault(name, {})[seed] = opinion
    table = summary(half(found, "report"), subjects_of(size))
    return {name: rows for name, rows in table.items() if name != "none"}
