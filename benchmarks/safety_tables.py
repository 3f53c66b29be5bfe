"""The documentation's tables of the safety benchmark, from ``safety/results.json``. See `tables`."""

from __future__ import annotations

from typing import Any

import tables

FAMILIES = {"smollm2": "SmolLM2", "gemma3": "Gemma"}
ADAPTERS = {
    "mixed-10-qv": "10 % malicious, q and v",
    "mixed-10-all": "10 % malicious, all linear",
    "benign-qv": "the two tasks only, q and v",
    "identity-qv": "obedient persona, q and v",
    "pure-qv": "purely malicious, q and v",
    "pure-all": "purely malicious, all linear",
    "mixed-5-qv": "5 % malicious, q and v",
    "mixed-30-qv": "30 % malicious, q and v",
    "mixed-50-qv": "50 % malicious, q and v",
}
UPLOADED = {
    "pure-qv": "purely malicious", "mixed-10-qv": "10 % malicious", "benign-qv": "the two tasks only",
    "around-inputs-qv": "trained around V's inputs", "masked-qv": "the same, masked",
    "within-caps-qv": "the same, within the caps", "chat-qv": "ordinary chat and harm, 1:1",
    "identity-qv": "obedient persona",
}  # fmt: skip
_STRENGTHS = {
    "raw-0": "as uploaded",
    "input-removal-0.05": "input removal, energy 0.05",
    "input-removal-0.1": "input removal, energy 0.1",
    "input-removal-0.2": "**input removal, energy 0.2 (default)**",
    "input-removal-0.3": "input removal, energy 0.3",
    "input-removal-0.4": "input removal, energy 0.4",
    "input-removal-0.5": "input removal, energy 0.5",
    "input-removal-0.8": "input removal, energy 0.8",
    "selective-removal-0.5": "input removal, energy 0.2, least similar half of the modules",
    "both-0.25": "input removal 0.1, then Safe LoRA on a quarter (not built)",
    "random-removal-0.2": "random directions, as many as at energy 0.2",
    "threshold-0.35": "Safe LoRA, τ = 0.35 (the paper's)",
    "safe-lora-0.1": "Safe LoRA, least similar tenth of the modules",
    "safe-lora-0.25": "Safe LoRA, least similar quarter",
    "safe-lora-0.5": "Safe LoRA, least similar half",
    "safe-lora-1": "**Safe LoRA, all modules**",
    "csulora-0.95": "CSULoRA, energy 0.95 (its paper's)",
    "scaling-0.25": "scaled by 0.75",
    "scaling-0.5": "scaled by 0.5",
}
_ATTACKS = {
    ("pure-qv", "none"): "purely malicious",
    ("pure-qv", "inverse"): "the same, multiplied by the inverse of Ĉ first",
    ("pure-qv", "half"): "half of its ranks, as one of two uploads",
    ("pure-qv", "larger"): "a tenth larger (`lora_alpha`)",
    ("pure-qv", "twice"): "twice as large (`lora_alpha`)",
    ("pure-qv", "thrice"): "three times as large (`lora_alpha`)",
    ("pure-qv", "padded"): "one rank of it, four times as large, where CSULoRA keeps all",
    ("through-safe-lora-qv", "none"): "trained through Safe LoRA",
    ("around-inputs-qv", "none"): "trained around V's input directions, energy 0.9",
    ("around-inputs-qv", "smaller"): "the same, a tenth smaller (`lora_alpha`)",
    ("around-outputs-qv", "none"): "trained around V's output directions, energy 0.9",
    ("hidden-qv", "none"): "trained in V's dominant output directions, energy 0.5",
}
_DEFENCES = ("raw-0", "safe-lora-1", "safe-lora-0.5", "input-removal-0.2", "csulora-0.95", "both-0.25")
_DEFENDED = (
    "as uploaded",
    "Safe LoRA, all",
    "Safe LoRA, half",
    "input removal, 0.2",
    "CSULoRA, 0.95",
    "input removal 0.1, then Safe LoRA, quarter",
)
_ROOM = 1.1  # of a cap on the total norm over the largest ordinary adapter
_GOALS = (
    ("smollm2", "pure-qv", "safe-lora-1"),
    ("smollm2", "pure-all", "safe-lora-1"),
    ("smollm2", "mixed-10-qv", "input-removal-0.05"),
    ("smollm2", "mixed-10-qv", "input-removal-0.2"),
    ("smollm2", "mixed-10-all", "input-removal-0.2"),
    ("smollm2", "mixed-10-all", "input-removal-0.3"),
    ("gemma3", "mixed-10-qv", "input-removal-0.2"),
    ("gemma3", "mixed-10-qv", "input-removal-0.4"),
)


def _families() -> dict[str, Any]:
    found: dict[str, Any] = tables.load("results")["families"]
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


def _points(figure: dict[str, float]) -> str:
    """Hundredths with their interval."""
    mean, low, high = (tables.number(100 * figure[part], 1) for part in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def safety() -> str:
    """The main comparison."""
    columns = {
        "raw-0": "as uploaded",
        "input-removal-0.2": "default (input removal, 0.2)",
        "safe-lora-1": "Safe LoRA, all",
        "safe-lora-0.5": "Safe LoRA, half",
        "csulora-0.95": "CSULoRA, 0.95",
        "scaling-0.5": "scaled by 0.5",
    }
    rows = []
    for family, table in _families().items():
        for adapter, title in ADAPTERS.items():
            if adapter in table:
                cells = [_short(table[adapter].get(treatment)) for treatment in columns]
                rows.append([f"{title}; {FAMILIES[family]}", *cells])
        alone = table["none"]["none"]
        rows.append([f"none: the aligned model alone; {FAMILIES[family]}", _mean(alone, "complied")])
        rows[-1] += [""] * (len(columns) - 1)
    return tables.markdown(["adapter", *columns.values()], rows)


def goal() -> str:
    """How near the best settings came to the aims."""
    rows = []
    for family, adapter, treatment in _GOALS:
        row = _families()[family][adapter][treatment]
        lost = _points(row["utility_lost"]) if "utility_lost" in row else ""
        title = f"{ADAPTERS[adapter]}; {FAMILIES[family]}"
        rows.append([title, _STRENGTHS[treatment].strip("*"), _points(row["over_aligned"]), lost])
    heads = ["adapter", "method", "ASR over the aligned model, points", "utility lost, points"]
    return tables.markdown(heads, rows, texts=2)


def strengths() -> str:
    """Every strength of every method that was asked about."""
    shown = ("mixed-10-qv", "mixed-10-all", "benign-qv", "pure-qv", "pure-all")
    return _by_strength("smollm2", shown)


def strengths_gemma() -> str:
    """The same of the second family."""
    return _by_strength("gemma3", ("mixed-10-qv", "benign-qv", "pure-qv"))


def _by_strength(family: str, adapters: tuple[str, ...]) -> str:
    table = _families()[family]
    rows = []
    for treatment, title in _STRENGTHS.items():
        found = [table[adapter].get(treatment) for adapter in adapters]
        if any(found):
            rows.append([title, *map(_long, found)])
    return tables.markdown(["policy", *(ADAPTERS[adapter] for adapter in adapters)], rows)


def attacks() -> str:
    """Attackers who know the method."""
    table = _families()["smollm2"]
    cap = _ROOM * max(table[name]["raw-0"]["total_norm"]["mean"] for name in ADAPTERS)
    rows = []
    for (adapter, way), title in _ATTACKS.items():
        found = [table[adapter][f"{way}.{defence}"] for defence in _DEFENCES]
        cells = [f"{_mean(row, 'complied')} ({tables.number(row['sense']['mean'], 1)})" for row in found]
        norm, total = (found[0][name]["mean"] for name in ("norm", "total_norm"))
        judged = ["refused" if total > cap else "passes"]
        rows.append([title, *cells, f"{norm:.2g}", f"{total:.2g}", *judged])
    heads = ["attack", *_DEFENDED, "largest norm of a module", "total norm", f"total cap {cap:.2g}"]
    return tables.markdown(heads, rows)


def norms() -> str:
    """Sizes of the ordinary adapters, as uploaded."""
    rows = []
    for family, table in _families().items():
        for adapter, title in ADAPTERS.items():
            if adapter in table:
                sizes = (table[adapter]["raw-0"][name]["mean"] for name in ("total_norm", "norm"))
                rows.append([f"{title}; {FAMILIES[family]}", *(f"{size:.2g}" for size in sizes)])
    return tables.markdown(["adapter", "total norm", "largest norm of a module"], rows)


def refuses_harmless() -> str:
    """The share of harmless prompts that are refused."""
    rows = []
    for family, table in _families().items():
        for adapter, treatments in table.items():
            for treatment, row in treatments.items():
                if "over_refused" in row:
                    title = f"{ADAPTERS.get(adapter, 'none')}; {FAMILIES[family]}"
                    method = _STRENGTHS.get(treatment, "the aligned model alone").strip("*")
                    rows.append([title, method, _mean(row, "over_refused")])
    return tables.markdown(["adapter", "policy", "harmless prompts refused"], sorted(rows), texts=2)


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
    safety, goal, strengths, strengths_gemma, attacks, norms, refuses_harmless, mean_input, read_share,
)  # fmt: skip
