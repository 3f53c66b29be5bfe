"""The tables of docs/policies.md and docs/what-policies-did.md on the safety benchmark. See `tables`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent / "safety"))

import pages
import tables
from safety_tables import ADAPTERS, PAIRS, STRENGTHS, fewer, mean, pairs_of

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


def _long(row: dict[str, Any] | None, seeds: Iterable[str]) -> str:
    """ASR, exact JSON and Rouge-1; marked where fewer seeds were asked."""
    if row is None:
        return ""
    figures = " / ".join(mean(row, measure) for measure in ("complied", "exact", "rouge1") if measure in row)
    return figures + fewer(row, seeds)


def settings() -> str:
    """What each setting does to an honest tenant, a careless one, a malicious one, and one who knows it."""
    figures = tables.load("results")
    return _by_pair(lambda pair: tables.markdown(["setting", *pages.AUTHORS], pages.settings(figures, pair)))


def strengths() -> str:
    """Every strength of every method that was asked about."""
    shown = ("mixed-10-qv", "mixed-10-all", "benign-qv", "pure-qv", "pure-all")

    def of(pair: str) -> str:
        table = pairs_of()[pair]
        adapters, seeds = [name for name in shown if name in table], table["none"]["none"]["seeds"]
        rows = []
        for treatment, title in STRENGTHS.items():
            found = [table[adapter].get(treatment) for adapter in adapters]
            if any(found):
                rows.append([title, *(_long(row, seeds) for row in found)])
        if any(cell.endswith(r"\*") for _, *cells in rows for cell in cells):  # of the first seed alone
            first = (table[adapter]["raw-0"]["seeds"][min(seeds, key=int)] for adapter in adapters)
            rows.insert(1, [r"as uploaded, of the seed that \* is of", *(f"{asr:.2f}\\*" for asr in first)])
        return tables.markdown(["policy", *(ADAPTERS[adapter] for adapter in adapters)], rows)

    return _by_pair(of)


def pictures() -> str:
    """ASR against utility, for each adapter that all methods were asked of."""
    folder = "../benchmarks/safety"
    return "\n".join(
        f"![ASR against utility, {PAIRS[pair]}, {ADAPTERS[adapter]}]({folder}/{pair}-{adapter}.png)"
        for pair, table in pairs_of().items()
        for adapter in pages.drawn(table)
    )


def attacks() -> str:
    """Attackers who know the method, of the first pair."""
    table = next(iter(pairs_of().values()))
    cap = pages.total_cap(table)
    rows = []
    for (adapter, way), title in _ATTACKS.items():
        of = table.get(adapter, {})
        found = [of.get(defence if way == "none" else f"{way}.{defence}") for defence in _DEFENCES]
        if found[0] is None:
            continue
        cells = [
            f"{mean(row, 'complied')} ({tables.number(row['sense']['mean'], 1)})" if row else ""
            for row in found
        ]
        norm, total = (found[0][name]["mean"] for name in ("norm", "total_norm"))
        rows.append([title, *cells, f"{norm:.2g}", f"{total:.2g}", "refused" if total > cap else "passes"])
    heads = ["attack", *_DEFENCES.values(), "largest norm of a module", "total norm", f"total cap {cap:.2g}"]
    return tables.markdown(heads, rows)


def norms() -> str:
    """Sizes of the adapters, as uploaded."""
    rows = []
    for pair, table in pairs_of().items():
        for adapter, title in ADAPTERS.items():
            if adapter in table:
                sizes = (table[adapter]["raw-0"][name]["mean"] for name in ("total_norm", "norm"))
                rows.append([f"{title}; {PAIRS[pair]}", *(f"{size:.2g}" for size in sizes)])
    return tables.markdown(["adapter", "total norm", "largest norm of a module"], rows)


def _by_pair(table_of: Callable[[str], str]) -> str:
    """A table for each pair, below its name and its seeds."""
    parts = []
    for pair, table in pairs_of().items():
        seeds = ", ".join(table["none"]["none"]["seeds"])
        parts.append(f"**{PAIRS[pair]}**, seed {seeds}:\n\n{table_of(pair)}")
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


TABLES = (settings, strengths, pictures, attacks, norms, mean_input, read_share)
