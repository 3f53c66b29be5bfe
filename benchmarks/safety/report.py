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
    first = [pair for pair in kept if pair == next(iter(PAIRS))]  # which is also the pair of the decisions
    minutes_file = cache / "minutes.json"
    figures: dict[str, Any] = {
        "pairs": {pair: summary(half(found, "report"), subjects_of(size)) for pair, found in kept.items()},
        "choose": {
            pair: summary(half(decided_on(kept[pair]), "choose"), subjects_of(size, 0)) for pair in first
        },
        "checks": {pair: _checks(cache, pair) for pair in kept},
        "exam": replays.exams(kept),
        "opinion": {pair: replays.opinions(found, size) for pair, found in kept.items()},
        "curves": {pair: _compared(found, size) for pair, found in kept.items()},
        "agreement": _agreement(kept),
        "risk": _risks(cache, kept),
        "where": why.measure(_with(cache, kept, why.ADAPTERS)),
        "minutes": json.loads(minutes_file.read_text()) if minutes_file.exists() else {},
    }
    figures["goals"] = goals.measure(kept, figures, size)
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


def _compared(kept: Kept, size: Size) -> dict[str, Any]:
    """The rule's curve and the others', of the adapter that all are asked of."""
    treatments = half(kept, "report").get(HARMFUL_AND_USEFUL, {})
    return dominance.compare(treatments, subjects_of(size)["complied"])


def _agreement(kept: Mapping[str, Kept]) -> dict[str, float]:
    """Between the measures: prompt by prompt, and over all points of the `report` half."""
    same, asr, drops = [], [], []
    for of in kept.values():
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


def _risks(cache: Path, kept: Mapping[str, Kept]) -> dict[str, Any]:
    """The sign-flip score of every adapter as uploaded, and its AUC."""
    scores: dict[str, dict[str, list[float]]] = {}
    for pair, of in kept.items():
        for home in seeds(cache, pair):
            base, aligned = cache / PAIRS[pair].family / BASE, home / ALIGNED
            if not base.exists():
                continue
            for adapter in sorted({*of} - {"none"}):
                if (home / adapter).exists():
                    z = risk.score(home / adapter, base, aligned)
                    scores.setdefault(pair, {}).setdefault(adapter, []).append(z)
    harmful, honest = [], []
    for by_adapter in scores.values():
        for adapter, values in by_adapter.items():
            (honest if adapter in goals.HONEST else harmful).extend(values)
    if not (harmful and honest):
        return {}
    return {"scores": scores, "auc": risk.auc(harmful, honest)}


def _checks(cache: Path, pair: str) -> dict[str, Any]:
    return {
        home.name: {
            name: json.loads(file.read_text())["figures"]
            for name in HALVES
            if (file := home / f"check-{name}.json").exists()
        }
        for home in seeds(cache, pair)
    }


def _with(cache: Path, kept: Mapping[str, Kept], adapters: Sequence[str]) -> list[Path]:
    homes = seeds(cache, next(iter(kept))) if kept else []
    return [home for home in homes if all((home / name).exists() for name in adapters)]


if __name__ == "__main__":
    figures = json.loads((HERE / "results.json").read_text())
    (HERE / "RESULTS.md").write_text(pages.text_of((HERE / "about.md").read_text(), figures))
