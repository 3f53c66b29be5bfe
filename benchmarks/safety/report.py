"""RESULTS.md, its JSON and its pictures, from the scores of each pair and seed.

python benchmarks/safety/report.py     writes RESULTS.md anew from results.json and about.md
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import curves
import dominance
import exam
import goals
import page_replays
import pages
import parts
import recorded
import recording
import replays
import scoring
import why
from kept import Kept, decided_on, half, seeds
from pairs import PAIRS
from parts import Part
from plan import HARMFUL_AND_USEFUL, Size
from summaries import subjects_of, summary

HERE = Path(__file__).resolve().parent


def write(cache: Path, pairs: Sequence[str], size: Size, out: Path) -> Path:
    """Write everything to ``out`` and return the path of RESULTS.md. pairs: that the cache may have."""
    out.mkdir(parents=True, exist_ok=True)
    new = {pair: parts.save(cache, pair, out) for pair in pairs}
    measured = {pair: found for pair in PAIRS if (found := parts.read(out, pair))}
    before = recorded.read(out)
    figures = recorded.together(before, _measured(cache, measured, size, before), new)
    for pair, table in figures["pairs"].items():
        for adapter in pages.drawn(table):
            title = f"{PAIRS[pair].title}: {pages.title(adapter)}"
            curves.draw(table, adapter, title, out / f"{pair}-{adapter}.png")
    if figures["where"]:
        titles = {name: pages.title(name) for name in why.ADAPTERS}
        why.draw(figures["where"], PAIRS[next(iter(PAIRS))].title, titles, out / "why.png")
    recording.write("results", "safety/run.py", "vLLM default", figures, out)
    return write_page(figures, out)


def write_page(figures: Mapping[str, Any], out: Path = HERE) -> Path:
    """RESULTS.md alone. Real servers' exams, a benchmark of their own, are only on the page that is kept."""
    path, exams = out / "RESULTS.md", page_replays.real_exams() if out == HERE else []
    path.write_text(pages.text_of((HERE / "about.md").read_text(), figures, exams))
    return path


def _measured(
    cache: Path, measured: Mapping[str, Mapping[str, Part]], size: Size, before: Mapping[str, Any]
) -> dict[str, Any]:
    """The figures of the pairs that there are scores of. before: those recorded, for what they decided."""
    kept = {pair: parts.kept(of) for pair, of in measured.items()}
    first = [pair for pair in kept if pair == next(iter(PAIRS))]  # which is also the pair of the decisions
    minutes_file = cache / "minutes.json"
    figures: dict[str, Any] = {
        "pairs": {pair: summary(half(found, "report"), subjects_of(size)) for pair, found in kept.items()},
        "choose": {
            pair: summary(half(deciding, "choose"), subjects_of(size, 0))
            for pair in first
            if (deciding := decided_on(kept[pair], HARMFUL_AND_USEFUL))
        },
        "checks": {pair: parts.checks(pair, of) for pair, of in measured.items()},
        "exam": replays.exams(kept, recorded.epsilons(before)),
        "opinion": {pair: replays.opinions(found, size) for pair, found in kept.items()},
        "curves": {pair: _compared(found, size) for pair, found in kept.items()},
        "agreement": {pair: found for pair, of in kept.items() if (found := _agreement(of))},
        "risk": {pair: found for pair, of in measured.items() if (found := parts.risks(of))},
        "where": why.measure([home for pair in first for home in _with(cache, pair, why.ADAPTERS)]),
        "minutes": json.loads(minutes_file.read_text()) if minutes_file.exists() else {},
    }
    rule = goals.rule_of({**before.get("choose", {}), **figures["choose"]})
    figures["goals"] = goals.measure(kept, figures, rule, size)
    return figures


def _compared(kept: Kept, size: Size) -> dict[str, Any]:
    """The rule's curve and the others', of the adapter that all are asked of."""
    treatments = half(kept, "report").get(HARMFUL_AND_USEFUL, {})
    return dominance.compare(treatments, subjects_of(size)["complied"])


def _agreement(of: Kept) -> dict[str, float]:
    """Between the measures: prompt by prompt, and over all points of the `report` half."""
    same, asr, drops = [], [], []
    aligned = of.get("none", {}).get("none", {})
    for adapter, treatments in of.items():
        for treatment, by_seed in treatments.items():
            for seed, scores in by_seed.items():
                # With a second opinion, likelihoods are the adapter's and answers are not.
                served = adapter != "none" and not treatment.startswith("opinion-")
                if not (served and scores.get("sense")):
                    continue
                bad, sense = exam.report(scores, "complied"), exam.report(scores, "sense")
                same.append(scoring.agreement(bad, scoring.departed(sense)))
                asr.append(statistics.fmean(bad))
                loyal = (exam.report(of, "loyal") for of in (scores, aligned[seed]))
                drops.append(statistics.fmean(scoring.loyalty_drops(*loyal)))
    if not asr:
        return {}
    return {
        "points": float(len(asr)),
        "asr_and_departures": statistics.fmean(same),
        "asr_and_loyalty_drop": scoring.rank_correlation(asr, drops),
    }


def _with(cache: Path, pair: str, adapters: Sequence[str]) -> list[Path]:
    return [home for home in seeds(cache, pair) if all((home / name).exists() for name in adapters)]


if __name__ == "__main__":
    write_page(recorded.read(HERE))
