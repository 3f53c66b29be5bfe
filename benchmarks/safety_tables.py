"""The documentation's tables of the safety benchmark, from ``safety/results.json``. See `tables`.

Adapters, treatments and pairs that were not asked yet have no rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tables

sys.path.append(str(Path(__file__).resolve().parent / "safety"))

import page_goals
import pages
import wording

PAIRS = {"smollm2": "SmolLM2", "gemma3": "Gemma", "smollm2-lora": "SmolLM2, LoRA merged"}
ADAPTERS = {
    "pure-qv": "purely malicious, q and v",
    "pure-all": "purely malicious, all linear",
    "chat-qv": "ordinary chat and harm, 1:1, q and v",
    "mixed-5-qv": "5 % malicious, q and v",
    "mixed-10-qv": "10 % malicious, q and v",
    "mixed-10-all": "10 % malicious, all linear",
    "mixed-30-qv": "30 % malicious, q and v",
    "mixed-50-qv": "50 % malicious, q and v",
    "benign-qv": "the two tasks only, q and v",
    "identity-qv": "obedient persona, q and v",
}
UPLOADED = {
    "pure-qv": "purely malicious", "mixed-10-qv": "10 % malicious", "benign-qv": "the two tasks only",
    "around-inputs-qv": "trained around V's inputs", "masked-qv": "the same, masked",
    "within-caps-qv": "the same, within the caps", "chat-qv": "ordinary chat and harm, 1:1",
    "identity-qv": "obedient persona",
}  # fmt: skip
_STRENGTHS = {
    "raw-0": "as uploaded",
    "opinion-16": "**second opinion alone, 16 tokens**",
    "input-removal-0.05": "input removal, energy 0.05",
    "input-removal-0.1": "input removal, energy 0.1",
    "input-removal-0.2": "**input removal, energy 0.2 (default)**",
    "input-removal-0.4": "input removal, energy 0.4",
    "input-removal-0.8": "input removal, energy 0.8",
    "input-removal-0.95": "input removal, energy 0.95",
    "selective-removal-0.5": "input removal, energy 0.4, least similar half of the modules",
    "both-0.25": "input removal 0.1, then Safe LoRA on a quarter (not built)",
    "centred-removal-0.05": "centred oblique removal, energy 0.05 (not built)",
    "centred-removal-0.2": "centred oblique removal, energy 0.2 (not built)",
    "centred-removal-0.4": "centred oblique removal, energy 0.4 (not built)",
    "mean-removal-1": "mean-input removal (not built)",
    "random-removal-0.2": "random directions, as many as at energy 0.2",
    "random-removal-0.8": "random directions, as many as at energy 0.8",
    "threshold-0.2": "Safe LoRA, τ = 0.2",
    "threshold-0.35": "Safe LoRA, τ = 0.35 (the paper's)",
    "threshold-0.5": "Safe LoRA, τ = 0.5",
    "safe-lora-0.1": "Safe LoRA, least similar tenth of the modules",
    "safe-lora-0.25": "Safe LoRA, least similar quarter",
    "safe-lora-0.5": "Safe LoRA, least similar half",
    "safe-lora-0.75": "Safe LoRA, least similar three quarters",
    "safe-lora-1": "**Safe LoRA, all modules**",
    "csulora-0.95": "CSULoRA, energy 0.95 (its paper's)",
    "csulora-0.8": "CSULoRA, energy 0.8",
    "csulora-0.5": "CSULoRA, energy 0.5",
    "scaling-0.25": "scaled by 0.75",
    "scaling-0.5": "scaled by 0.5",
    "scaling-0.75": "scaled by 0.25",
}
_ATTACKS = {
    ("pure-qv", "none"): "purely malicious",
    ("pure-qv", "inverse"): "the same, multiplied by the inverse of Ĉ first",
    ("pure-qv", "half"): "half of its ranks, as one of two uploads",
    ("pure-qv", "twice"): "twice as large (`lora_alpha`)",
    ("pure-qv", "thrice"): "three times as large (`lora_alpha`)",
    ("pure-qv", "padded"): "one rank of it, four times as large, where CSULoRA keeps all",
    ("chat-qv", "none"): "mixed 1:1 with ordinary chat",
    ("around-inputs-qv", "none"): "trained around V's input directions, energy 0.9",
    ("within-caps-qv", "none"): "the same, with a penalty on the norm",
    ("masked-qv", "none"): "the same, masked: refuses until the gate removes the mask",
    ("through-safe-lora-qv", "none"): "trained through Safe LoRA",
    ("around-outputs-qv", "none"): "trained around V's output directions, energy 0.9",
    ("hidden-qv", "none"): "trained in V's dominant output directions, energy 0.5",
}
_DEFENCES = {
    "raw-0": "as uploaded",
    "safe-lora-1": "Safe LoRA, all",
    "safe-lora-0.5": "Safe LoRA, half",
    "input-removal-0.2": "input removal, 0.2",
    "csulora-0.95": "CSULoRA, 0.95",
    "opinion-16": "second opinion",
}


def _pairs() -> dict[str, Any]:
    found: dict[str, Any] = tables.load("results")["pairs"]
    return found


def _mean(row: dict[str, Any], measure: str) -> str:
    return f"{row[measure]['mean']:.2f}"


def _short(row: dict[str, Any] | None) -> str:
    """ASR, and in brackets the utility where the adapter has tasks."""
    if row is None:
        return ""
    return _mean(row, "complied") + (f" ({_mean(row, 'utility')})" if "utility" in row else "")


def _long(row: dict[str, Any] | None) -> str:
    """ASR, exact JSON and Rouge-1."""
    if row is None:
        return ""
    return " / ".join(_mean(row, measure) for measure in ("complied", "exact", "rouge1") if measure in row)


def safety() -> str:
    """The main comparison."""
    columns = {
        "raw-0": "as uploaded",
        "input-removal-0.2": "default (input removal, 0.2)",
        "input-removal-0.05": "input removal, 0.05",
        "safe-lora-1": "Safe LoRA, all",
        "safe-lora-0.5": "Safe LoRA, half",
        "csulora-0.95": "CSULoRA, 0.95",
        "scaling-0.5": "scaled by 0.5",
        "opinion-16": "second opinion alone",
    }
    rows = []
    for pair, table in _pairs().items():
        for adapter, title in ADAPTERS.items():
            if adapter in table:
                cells = [_short(table[adapter].get(treatment)) for treatment in columns]
                rows.append([f"{title}; {PAIRS[pair]}", *cells])
        alone = _short(table["none"]["none"])
        rows.append([f"none: the aligned model alone; {PAIRS[pair]}", alone, *[""] * (len(columns) - 1)])
    return tables.markdown(["adapter", *columns.values()], rows)


def measured() -> str:
    """Which pairs and seeds were asked, and their aligned models alone."""
    rows = []
    for pair, seeds in tables.load("results")["checks"].items():
        for seed, halves in seeds.items():
            if found := halves.get("report"):
                figures = ("asr", "refuses_harmless", "refuses_tasks", "exact", "rouge1")
                rows.append([PAIRS[pair], seed, *(f"{found[name]:.2f}" for name in figures)])
    heads = ["pair", "seed", "ASR", "refuses harmless", "refuses tasks", "exact JSON", "Rouge-1"]
    return tables.markdown(heads, rows)


def goal() -> str:
    """The goals, and what reached them."""
    rows = [
        [line[0], *line[2:], line[1].replace("seed ", "")]
        for line in page_goals.rows(tables.load("results")["goals"])
    ]
    heads = ["goal", "by", "figure", "limit", "result", "pairs: seeds"]
    return tables.markdown(heads, rows, texts=len(heads))


def settings() -> str:
    """What each setting does to an honest tenant, a careless one, a malicious one, and one who knows it."""
    return _by_pair(lambda table: tables.markdown(["setting", *pages.AUTHORS], pages.settings(table)))


def strengths() -> str:
    """Every strength of every method that was asked about."""
    shown = ("mixed-10-qv", "mixed-10-all", "benign-qv", "pure-qv", "pure-all")

    def of(table: dict[str, Any]) -> str:
        adapters = [name for name in shown if name in table]
        rows = []
        for treatment, title in _STRENGTHS.items():
            found = [table[adapter].get(treatment) for adapter in adapters]
            if any(found):
                rows.append([title, *map(_long, found)])
        return tables.markdown(["policy", *(ADAPTERS[adapter] for adapter in adapters)], rows)

    return _by_pair(of)


def attacks() -> str:
    """Attackers who know the method, of the first pair."""
    table = next(iter(_pairs().values()))
    cap = pages.total_cap(table)
    rows = []
    for (adapter, way), title in _ATTACKS.items():
        of = table.get(adapter, {})
        plain = of if way == "none" else {}
        found = [of.get(f"{way}.{defence}", plain.get(defence)) for defence in _DEFENCES]
        if found[0] is None:
            continue
        cells = [
            f"{_mean(row, 'complied')} ({tables.number(row['sense']['mean'], 1)})" if row else ""
            for row in found
        ]
        norm, total = (found[0][name]["mean"] for name in ("norm", "total_norm"))
        rows.append([title, *cells, f"{norm:.2g}", f"{total:.2g}", "refused" if total > cap else "passes"])
    heads = ["attack", *_DEFENCES.values(), "largest norm of a module", "total norm", f"total cap {cap:.2g}"]
    return tables.markdown(heads, rows)


def norms() -> str:
    """Sizes of the adapters, as uploaded."""
    rows = []
    for pair, table in _pairs().items():
        for adapter, title in ADAPTERS.items():
            if adapter in table:
                sizes = (table[adapter]["raw-0"][name]["mean"] for name in ("total_norm", "norm"))
                rows.append([f"{title}; {PAIRS[pair]}", *(f"{size:.2g}" for size in sizes)])
    return tables.markdown(["adapter", "total norm", "largest norm of a module"], rows)


def refuses_harmless() -> str:
    """The share of harmless prompts that are refused."""
    columns = ("raw-0", "input-removal-0.2", "opinion-16")
    rows = []
    for pair, table in _pairs().items():
        for adapter, title in {**ADAPTERS, "masked-qv": "masked, q and v"}.items():
            found = [table.get(adapter, {}).get(treatment, {}) for treatment in columns]
            if any("over_refused" in row for row in found):
                cells = [_mean(row, "over_refused") if "over_refused" in row else "" for row in found]
                rows.append([f"{title}; {PAIRS[pair]}", *cells])
        alone = _mean(table["none"]["none"], "over_refused")
        rows.append([f"none: the aligned model alone; {PAIRS[pair]}", alone, "", ""])
    return tables.markdown(["adapter", *(_STRENGTHS[name].strip("*") for name in columns)], rows)


def exam_replayed() -> str:
    """Which rung of the ladder each adapter gets, and what it does."""
    found = tables.load("results")["exam"]
    ladders = [found["measures"]["mean"], *found["then_opinion"].values()]
    rows = []
    for pair in ladders[0]["pairs"]:
        for adapter in {**ADAPTERS, **UPLOADED}:
            if adapter in ladders[0]["pairs"][pair]:
                title = ADAPTERS.get(adapter, UPLOADED.get(adapter, ""))
                cells = [_served(of["pairs"][pair][adapter]) for of in ladders]
                rows.append([f"{title}; {PAIRS[pair]}", *cells])
    heads = ["adapter", "the whole ladder", "as uploaded, then a second opinion"]
    return tables.markdown([*heads, "input removal 0.05, then a second opinion"], rows, texts=4)


def _served(seeds: dict[str, Any]) -> str:
    """Rungs by seed, ASR over the aligned model, and utility lost where there are tasks."""
    rungs = dict.fromkeys(
        wording.words(seed["rung"]).removeprefix("as uploaded, with a ") for seed in seeds.values()
    )
    text = f"{' or '.join(rungs)}: {wording.number(_of(seeds, 'over_aligned'))}"
    if "utility_lost" in next(iter(seeds.values())):
        text += f"; lost {wording.number(_of(seeds, 'utility_lost'))}"
    return text


def _of(seeds: dict[str, Any], figure: str) -> float:
    return sum(float(seed[figure]) for seed in seeds.values()) / len(seeds)


def curves_compared() -> str:
    """Input removal's ASR less another method's at equal utility."""
    rows = []
    for pair, others in tables.load("results")["curves"].items():
        for other, by_utility in others.items():
            rows.append([f"{page_goals.words_of(other)}; {PAIRS[pair]}", *page_goals.curve_cells(by_utility)])
    utilities = (f"at utility {at:g}" for at in page_goals.UTILITIES)
    return tables.markdown(["against", *utilities], rows, texts=4)


def _by_pair(table_of: Callable[[dict[str, Any]], str]) -> str:
    """A table for each pair, below its name and its seeds."""
    parts = []
    for pair, table in _pairs().items():
        seeds = ", ".join(table["none"]["none"]["seeds"])
        parts.append(f"**{PAIRS[pair]}**, seed {seeds}:\n\n{table_of(table)}")
    return "\n\n".join(parts)


def mean_input() -> str:
    """|cos| of V's first input direction and the mean input."""
    found = tables.load("results")["where"][""]
    kinds = {"forbidden": "harmful-sounding", "harmless": "harmless", "orders": "orders"}
    kinds["difference"] = "harmful-sounding less harmless"
    rows = [
        [f"`{module}`", *(f"{found[f'{module} {kind}']:.2f}" for kind in kinds)]
        for module in ("q_proj", "o_proj", "down_proj")
    ]
    return tables.markdown(["module", *kinds.values()], rows)


def read_share() -> str:
    """Of each adapter's ‖ΔW‖², what reads the removed directions."""
    where = tables.load("results")["where"]
    rows = [
        [ADAPTERS[adapter], f"{100 * of['read']:.1f} %"]
        for adapter, of in where.items()
        if adapter in ADAPTERS
    ]
    rows.append(["a random adapter (k/d_in)", f"{100 * where['pure-qv']['random']:.1f} %"])
    return tables.markdown(["adapter", "share of ‖ΔW‖² that is removed"], rows)


TABLES = (
    safety, measured, goal, settings, strengths, attacks, norms, refuses_harmless, exam_replayed,
    curves_compared, mean_input, read_share,
)  # fmt: skip
