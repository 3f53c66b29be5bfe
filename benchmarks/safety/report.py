"""RESULTS.md, its JSON and its pictures, from the kept scores.

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
import pages
import recorded
import recording
import replays
import risk
import scoring
import why
from kept import Kept, decided_on, half, read, seeds
from pairs import BASE, PAIRS
from plan import HARMFUL_AND_USEFUL, Size
from subjects import HALVES
from summaries import subjects_of, summary
from training import ALIGNED

HERE = Path(__file__).resolve().parent


def write(cache: Path, pairs: Sequence[str], size: Size, out: Path) -> Path:
    """Write everything to ``out`` and return the path of RESULTS.md."""
    out.mkdir(parents=True, exist_ok=True)
    kept = {pair: found for pair in pairs if (found := read(cache, pair))}
    before = recorded.read(out)
    figures = recorded.together(before, _measured(cache, kept, size, before))
    for pair, table in figures["pairs"].items():
        for adapter in pages.drawn(table):
            title = f"{PAIRS[pair].title}: {pages.title(adapter)}"
            curves.draw(table, adapter, title, out / f"{pair}-{adapter}.png")
    if figures["where"]:
        why.draw(figures["where"], {name: pages.title(name) for name in why.ADAPTERS}, out / "why.png")
    recording.write("results", "safety/run.py", "vLLM default", figures, out)
    path = out / "RESULTS.md"
    path.write_text(pages.text_of((HERE / "about.md").read_text(), figures))
    return path


def _measured(cache: Path, kept: Mapping[str, Kept], size: Size, before: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of the pairs that the cache has. before: those recorded, for what they decided."""
    first = [pair for pair in kept if pair == next(iter(PAIRS))]  # which is also the pair of the decisions
    minutes_file = cache / "minutes.json"
    figures: dict[str, Any] = {
        "pairs": {pair: summary(half(found, "report"), subjects_of(size)) for pair, found in kept.items()},
        "choose": {
            pair: summary(half(decided_on(kept[pair]), "choose"), subjects_of(size, 0)) for pair in first
        },
        "checks": {pair: _checks(cache, pair) for pair in kept},
        "exam": replays.exams(kept, recorded.epsilons(before)),
        "opinion": {pair: replays.opinions(found, size) for pair, found in kept.items()},
        "curves": {pair: _compared(found, size) for pair, found in kept.items()},
        "agreement": {pair: found for pair, of in kept.items() if (found := _agreement(of))},
        "risk": {pair: found for pair, of in kept.items() if (found := _risks(cache, pair, of))},
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
                drops.append(exam.drop(scores, aligned[seed]))
    if not asr:
        return {}
    return {
        "points": float(len(asr)),
        "asr_and_departures": statistics.fmean(same),
        "asr_and_loyalty_drop": scoring.rank_correlation(asr, drops),
    }


def _risks(cache: Path, pair: str, of: Kept) -> dict[str, list[float]]:
    """The sign-flip score of every adapter as uploaded, by seed."""
    base = cache / PAIRS[pair].family / BASE
    scores: dict[str, list[float]] = {}
    for home in seeds(cache, pair) if base.exists() else ():
        for adapter in sorted({*of} - {"none"}):
            if (home / adapter).exists():
                z = risk.score(home / adapter, base, home / ALIGNED)
                scores.setdefault(adapter, []).append(z)
    return scores


def _checks(cache: Path, pair: str) -> dict[str, Any]:
    """By seed; once where all seeds have the same aligned model."""
    return {
        home.name if PAIRS[pair].each_seed else "all": {
            name: json.loads(file.read_text())["figures"]
            for name in HALVES
            if (file := (home / ALIGNED).resolve().with_name(f"check-{name}.json")).exists()
        }
        for home in seeds(cache, pair)
    }


def _with(cache: Path, pair: str, adapters: Sequence[str]) -> list[Path]:
    return [home for home in seeds(cache, pair) if all((home / name).exists() for name in adapters)]


if __name__ == "__main__":
    figures = json.loads((HERE / "results.json").read_text())
    (HERE / "RESULTS.md").write_text(pages.text_of((HERE / "about.md").read_text(), figures))
