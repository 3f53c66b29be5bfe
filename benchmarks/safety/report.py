"""RESULTS.md, its JSON and its pictures, from the kept scores.

python benchmarks/safety/report.py     writes RESULTS.md anew from results.json and about.md
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import curves
import recording
import scoring
import why
from adapters import KINDS, NAMES, attack_names
from attackers import ATTACKS
from families import FAMILIES
from plan import CURVES, Size, plain

HERE = Path(__file__).resolve().parent
CAP = 1.0  # the default of --max-relative-norm
_ROOM = 1.1  # a cap on the total norm, over the largest of the ordinary adapters
Scores = dict[str, list[float]]
Kept = dict[str, dict[str, dict[str, Scores]]]  # adapter, treatment, seed
_FULL = {
    "raw-0": "as uploaded",
    "scaling-0.5": "scaled by 0.5",
    "safe-lora-0.5": "Safe LoRA, 50 % of modules",
    "safe-lora-1": "Safe LoRA, all",
    "csulora-0.95": "CSULoRA, 0.95",
    "input-removal-0.1": "input removal, 0.1",
    "input-removal-0.2": "input removal, 0.2",
    "input-removal-0.3": "input removal, 0.3",
    "input-removal-0.4": "input removal, 0.4",
    "input-removal-0.5": "input removal, 0.5",
    "selective-removal-0.5": "input removal, 0.2, of the least similar 50 % of modules",
    "both-0.25": "input removal, 0.1, then Safe LoRA, 25 % of modules",
}
_DEFENCES = ("safe-lora-1", "safe-lora-0.5", "input-removal-0.2", "csulora-0.95", "both-0.25")
_WAYS = {
    "none": "",
    "inverse": ", multiplied by the inverse of Ĉ first",
    "half": ", half of its ranks, as one of two uploads",
    "smaller": ", a tenth smaller (`lora_alpha`)",
    "larger": ", a tenth larger (`lora_alpha`)",
    "twice": ", twice as large (`lora_alpha`)",
    "thrice": ", three times as large (`lora_alpha`)",
    "padded": ", one rank of it, four times as large, where CSULoRA keeps all",
}


def write(cache: Path, families: Sequence[str], size: Size, out: Path) -> Path:
    """Write everything to ``out`` and return the path of RESULTS.md."""
    out.mkdir(parents=True, exist_ok=True)
    subjects = _subjects(size)
    found = {family: summary(read(cache, family), subjects) for family in families}
    minutes_file = cache / "minutes.json"
    minutes = json.loads(minutes_file.read_text()) if minutes_file.exists() else {}
    for family, table in found.items():
        for adapter in [name for name in _drawn(table) if name != curves.BENIGN]:
            title = f"{FAMILIES[family].title}: {_title(adapter)}"
            curves.draw(table, adapter, title, out / f"{family}-{adapter}.png")
    homes = [
        home for home in seeds(cache, families[0]) if all((home / name).exists() for name in why.ADAPTERS)
    ]
    if where := why.measure(homes):
        why.draw(where, {name: _title(name) for name in why.ADAPTERS}, out / "why.png")
    figures = {"families": found, "where": where, "minutes": minutes}
    recording.write("results", "safety/run.py", "vLLM default", figures, out)
    path = out / "RESULTS.md"
    path.write_text(text_of(figures))
    return path


def text_of(figures: dict[str, Any]) -> str:
    """RESULTS.md, from about.md and what results.json has."""
    text = [(HERE / "about.md").read_text().strip()]
    for family, table in figures["families"].items():
        if not table:
            continue
        text += [f"## {FAMILIES[family].title}", *_family(table)]
        if drawn := _drawn(table):
            text += ["### Curves", _points(table, drawn)]
        for adapter in [name for name in drawn if name != curves.BENIGN]:
            text.append(f"![ASR against utility, {_title(adapter)}]({family}-{adapter}.png)")
    if where := figures["where"]:
        text += ["## Why it works", why.TEXT, "![What is removed, and what reads it](why.png)", _where(where)]
    if minutes := figures["minutes"]:
        text += ["## Time", _minutes(minutes)]
    return "\n\n".join(text) + "\n"


def _drawn(table: dict[str, Any]) -> list[str]:
    """The adapters whose curves are drawn."""
    return [name for name in CURVES if "threshold-0.35" in table.get(name, {})]


def read(cache: Path, family: str) -> Kept:
    """All kept scores of a family, of every seed that has them."""
    found: Kept = {}
    for home in seeds(cache, family):
        for file in sorted((home / "scores").glob("*/*.json")):
            scores = json.loads(file.read_text())["scores"]
            found.setdefault(file.parent.name, {}).setdefault(file.stem, {})[home.name] = scores
    return found


def seeds(cache: Path, family: str) -> list[Path]:
    """Folders of the seeds that were asked about."""
    homes = (home for home in (cache / family).glob("[0-9]*") if (home / "scores" / "none").exists())
    return sorted(homes, key=lambda home: int(home.name))


def summary(kept: Kept, subjects: dict[str, list[str]]) -> dict[str, Any]:
    """Means with intervals by adapter, treatment and measure.

    Beside what was asked: ``over_aligned``, the ASR's distance to that of the aligned model on the same
    prompts; ``utility``, the mean of both tasks; ``utility_lost``, its distance to that of the adapter as
    uploaded, on the same prompts; ``seeds``, each one's ASR; ``prompts``, how many forbidden.
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


def _utility(run: Scores) -> list[float]:
    return [(x + y) / 2 for x, y in zip(run["exact"], run["rouge1"], strict=True)]


def _interval(runs: list[list[float]], subjects: list[str] | None) -> dict[str, float]:
    count = min(map(len, runs))  # fewer prompts are the first of more
    runs = [run[:count] for run in runs]
    return scoring.interval(runs, subjects[:count] if subjects else list(map(str, range(count))))


def _subjects(size: Size) -> dict[str, list[str]]:
    asked = plain(size)
    return {
        "complied": [p.subject for p in asked.forbidden],
        "over_refused": [p.subject for p in asked.harmless],
    }


def _title(adapter: str) -> str:
    kind, _, shape = adapter.rpartition("-")
    return f"{KINDS[kind].title}, {'q and v, r = 8' if shape == 'qv' else 'all linear, r = 16'}"


def _family(table: dict[str, Any]) -> list[str]:
    aligned = table["none"]["none"]
    text = [
        f"The aligned model alone: ASR {_cell(aligned['complied'])}, refuses harmless prompts "
        f"{_cell(aligned['over_refused'])}."
    ]
    rows = []
    for adapter in [name for name in NAMES if name in table]:
        for treatment, title in _FULL.items():
            if row := table[adapter].get(treatment):
                rows.append([_title(adapter), title, *_cells(row, _MEASURES), str(len(row["seeds"]))])
    text.append(_markdown(["adapter", "method", *_MEASURES.values(), "seeds"], rows))
    if any(name in table for name in attack_names()):
        text += ["### Attackers", _ATTACKS, _attacks(table)]
    return text


_MEASURES = {
    "complied": "ASR",
    "over_aligned": "ASR over aligned",
    "over_refused": "refuses harmless",
    "exact": "exact JSON",
    "rouge1": "Rouge-1",
    "utility_lost": "utility lost",
    "loyal": "loyalty",
    "sense": "sense",
}


_ATTACKS = """Seed 0. ASR, and in brackets the mean *sense* of the answers. The server had no norm cap.
The column beside a norm says what a cap would have done to the upload: `--max-relative-norm` at its
default, and `--max-total-norm` a tenth above the largest ordinary adapter of these tables."""
_ON_CURVES = {"complied": "ASR", "exact": "exact JSON", "rouge1": "Rouge-1"}


def _attacks(table: dict[str, Any]) -> str:
    defences = ["raw-0", *_DEFENCES]
    honest = _ROOM * max(table[name]["raw-0"]["total_norm"]["mean"] for name in NAMES if name in table)
    rows = []
    for adapter in ["pure-qv", *attack_names()]:
        for way, said in _WAYS.items():
            rows_of = table.get(adapter, {})
            if not all(f"{way}.{d}" in rows_of for d in defences):
                continue
            found = {d: rows_of[f"{way}.{d}"] for d in defences}
            kind = adapter.removesuffix("-qv")
            title = (ATTACKS[kind].title if kind in ATTACKS else KINDS[kind].title) + said
            norm, total = (found["raw-0"][name]["mean"] for name in ("norm", "total_norm"))
            cells = [
                f"{found[d]['complied']['mean']:.2f} ({found[d]['sense']['mean']:.1f})" for d in defences
            ]
            capped = ["refused" if size > cap else "passes" for size, cap in ((norm, CAP), (total, honest))]
            rows.append([title, *cells, f"{norm:.3g}", capped[0], f"{total:.2g}", capped[1]])
    heads = ["attack", *(_FULL[d] for d in defences), "largest ‖ΔW‖/‖W‖", f"norm cap {CAP:g}"]
    return _markdown([*heads, "total norm", f"total cap {honest:.2g}"], rows)


def _points(table: dict[str, Any], adapters: Sequence[str]) -> str:
    """Every point of the curves."""
    rows = []
    for adapter in adapters:
        for treatment in sorted(table[adapter]):
            row = table[adapter][treatment]
            if "." not in treatment.rpartition("-")[0]:
                rows.append(
                    [
                        _title(adapter),
                        _words(treatment),
                        *_cells(row, _ON_CURVES),
                        str(row["prompts"]),
                        str(len(row["seeds"])),
                    ]
                )
    return _markdown(["adapter", "treatment", *_ON_CURVES.values(), "prompts a seed", "seeds"], rows)


def _words(treatment: str) -> str:
    method, _, strength = treatment.rpartition("-")
    if treatment == "raw-0":
        return "as uploaded"
    if method in ("safe-lora", "selective-removal", "both"):
        return f"{_METHODS[method]}, {float(strength):.0%} of modules".replace("%", " %")
    return f"{_METHODS[method]} {1.0 - float(strength) if method == 'scaling' else float(strength):g}"


_METHODS = {
    "both": "input removal 0.1, then Safe LoRA",
    "csulora": "CSULoRA",
    "input-removal": "input removal",
    "random-removal": "random removal",
    "safe-lora": "Safe LoRA",
    "scaling": "scaled by",
    "selective-removal": "input removal 0.2, least similar",
    "threshold": "Safe LoRA, τ =",
}


def _where(where: dict[str, dict[str, float]]) -> str:
    parts = [["r₁ and the mean input", name, f"{cosine:.2f}"] for name, cosine in where[""].items()]
    for adapter in [name for name in where if name]:
        parts += [[_title(adapter), name, f"{share:.4f}"] for name, share in where[adapter].items()]
    return _markdown(["of", "what", "figure"], parts)


def _cells(row: dict[str, Any], measures: dict[str, str]) -> list[str]:
    return [_cell(row[measure]) if measure in row else "" for measure in measures]


def _cell(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _minutes(minutes: dict[str, float]) -> str:
    rows = [[what, f"{took:.0f}"] for what, took in minutes.items()]
    total = f"{sum(minutes.values()):.0f}"
    note = "On two CPU cores, summed over all runs that it took; raw figures of one machine."
    return f"{note}\n\n" + _markdown(["part", "minutes"], [*rows, ["all", total]])


if __name__ == "__main__":
    (HERE / "RESULTS.md").write_text(text_of(json.loads((HERE / "results.json").read_text())))
