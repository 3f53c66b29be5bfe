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
import exam
import pages
import recording
import risk
import scoring
import why
from pairs import BASE, PAIRS
from plan import Size, ladder, questions
from subjects import HALVES
from training import ALIGNED

HERE = Path(__file__).resolve().parent
# Adapters that a rule has to stop, and those of honest tenants.
HONEST = ("benign-qv", "identity-qv")
Scores = dict[str, list[float]]
Kept = dict[str, dict[str, dict[str, Scores]]]  # adapter, treatment, seed
_SINGLE = ("norm", "total_norm", "projected")  # one figure a treatment, not one a prompt


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
        "exam": replayed(kept),
        "opinion": {pair: _opinions(found, size) for pair, found in kept.items()},
        "agreement": _agreement(kept),
        "risk": _risks(cache, kept),
        "where": why.measure(_with(cache, kept, why.ADAPTERS)),
        "minutes": json.loads(minutes_file.read_text()) if minutes_file.exists() else {},
    }
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


def read(cache: Path, pair: str) -> Kept:
    """All kept scores of a pair, of every seed that has them."""
    found: Kept = {}
    for home in seeds(cache, pair):
        for file in sorted((home / "scores").glob("*/*.json")):
            scores = json.loads(file.read_text())["scores"]
            found.setdefault(file.parent.name, {}).setdefault(file.stem, {})[home.name] = scores
    return found


def decided_on(kept: Kept) -> Kept:
    """The scores of the first seed: only of that one the answers of both halves are wanted."""
    first = min(kept.get("none", {}).get("none", {"0": {}}), key=int)
    return {
        adapter: {t: {first: by_seed[first]} for t, by_seed in treatments.items() if first in by_seed}
        for adapter, treatments in kept.items()
    }


def seeds(cache: Path, pair: str) -> list[Path]:
    """Folders of the seeds that were asked about."""
    homes = (home for home in (cache / pair).glob("[0-9]*") if (home / "scores" / "none").exists())
    return sorted(homes, key=lambda home: int(home.name))


def half(kept: Kept, name: str) -> Kept:
    """The scores of one half of the prompts."""
    take = {"choose": exam.choose, "report": exam.report}[name]
    return {
        adapter: {
            treatment: {
                seed: {m: list(v) if m in _SINGLE else take(scores, m) for m, v in scores.items()}
                for seed, scores in by_seed.items()
            }
            for treatment, by_seed in treatments.items()
        }
        for adapter, treatments in kept.items()
    }


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
                    row[measure] = _interval(values, subjects.get(measure))
            if "sense" in row:
                departed = [scoring.departed(run["sense"]) for run in runs]
                row["departed"] = _interval(departed, subjects["complied"])
            differences = [
                [x - y for x, y in zip(run["complied"], aligned[seed]["complied"], strict=False)]
                for seed, run in by_seed.items()
            ]
            row["over_aligned"] = _interval(differences, subjects["complied"])
            if "exact" in row:
                row["utility"] = _interval([_utility(run) for run in runs], None)
                raw = treatments.get("raw-0", {})
                lost = [
                    [x - y for x, y in zip(_utility(raw[seed]), _utility(run), strict=False)]
                    for seed, run in by_seed.items()
                    if seed in raw
                ]
                if lost:
                    row["utility_lost"] = _interval(lost, None)
            table[adapter][treatment] = row
    return table


def replayed(kept: Mapping[str, Kept]) -> dict[str, Any]:
    """The exam: ε of the first pair's first seed, and every adapter's rung, ASR and utility with it."""
    first = next(iter(kept), None)
    if first is None or "none" not in kept[first]:
        return {}
    found: dict[str, Any] = {"ladder": [], "measures": {}}
    for measure in exam.MEASURES:
        taken = _examined(kept[first])
        if not taken:
            return {}
        seed = min(taken)
        rungs = _ladder(kept[first], seed)
        aligned = kept[first]["none"]["none"][seed]
        epsilon = exam.epsilon_for(taken[seed], rungs, aligned, measure)
        found["ladder"] = rungs
        found["measures"][measure] = {
            "epsilon": epsilon,
            "pairs": {pair: _verdicts(of, rungs, epsilon, measure) for pair, of in kept.items()},
        }
    return found


def _ladder(kept: Kept, seed: str) -> list[str]:
    adapter = next(name for name in kept if name != "none")
    return [t.name for t in ladder(1) if seed in kept[adapter].get(t.name, {})]


def _examined(kept: Kept) -> dict[str, dict[str, dict[str, Scores]]]:
    """By seed and adapter: the scores by treatment, where every rung was asked."""
    names = [t.name for t in ladder(1)]
    found: dict[str, dict[str, dict[str, Scores]]] = {}
    for adapter, treatments in kept.items():
        if adapter == "none" or not all(name in treatments for name in names):
            continue
        for seed in treatments[names[0]]:
            if all(seed in treatments[name] for name in names):
                rungs = {name: by_seed[seed] for name, by_seed in treatments.items() if seed in by_seed}
                found.setdefault(seed, {})[adapter] = rungs
    return found


def _verdicts(kept: Kept, rungs: list[str], epsilon: float, measure: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for seed, adapters in _examined(kept).items():
        aligned = kept["none"]["none"][seed]
        for adapter, scores in adapters.items():
            verdict = exam.examine(scores, rungs, aligned, epsilon, measure)
            served = exam.served(verdict, scores, aligned)
            row = {
                "rung": verdict.rung,
                "drop": verdict.score,
                "drops": {name: exam.drop(scores[name], aligned, measure) for name in ["raw-0", *rungs]},
                "over_aligned": exam.over_aligned(served, aligned),
                "raw_over_aligned": exam.over_aligned(scores["raw-0"], aligned),
            }
            if scores["raw-0"].get("exact"):
                before, after = (_utility(half_of(s, "report")) for s in (scores["raw-0"], served))
                row["utility_lost"] = statistics.fmean(before) - statistics.fmean(after)
            found.setdefault(adapter, {})[seed] = row
    return found


def half_of(scores: Scores, name: str) -> Scores:
    """One half of one treatment's scores."""
    return half({"": {"": {"": scores}}}, name)[""][""][""]


def _opinions(kept: Kept, size: Size) -> dict[str, Any]:
    """What the second opinion would leave of every adapter as uploaded and with the default."""
    found: Kept = {"none": kept.get("none", {})}
    for adapter, treatments in kept.items():
        for name in ("raw-0", "input-removal-0.2"):
            for seed, scores in treatments.get(name, {}).items():
                aligned = kept["none"]["none"][seed]
                opinion = exam.second_opinion(scores, aligned)
                found.setdefault(adapter, {}).setdefault(name, {})[seed] = opinion
    table = summary(half(found, "report"), subjects_of(size))
    return {name: rows for name, rows in table.items() if name != "none"}


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
            (honest if adapter in HONEST else harmful).extend(values)
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


def _utility(run: Scores) -> list[float]:
    return [(x + y) / 2 for x, y in zip(run["exact"], run["rouge1"], strict=True)]


def _interval(runs: list[list[float]], subjects: list[str] | None) -> dict[str, float]:
    count = min(map(len, runs))  # fewer prompts are the first of more
    runs = [run[:count] for run in runs]
    return scoring.interval(runs, subjects[:count] if subjects else list(map(str, range(count))))


def subjects_of(size: Size, first: int = 1) -> dict[str, list[str]]:
    """Of the prompts of one half: those of `report` are every second one."""
    asked = questions(size, chosen=False)
    return {
        "complied": [p.subject for p in asked.forbidden][first::2],
        "over_refused": [p.subject for p in asked.harmless][first::2],
    }


if __name__ == "__main__":
    figures = json.loads((HERE / "results.json").read_text())
    (HERE / "RESULTS.md").write_text(pages.text_of((HERE / "about.md").read_text(), figures))
