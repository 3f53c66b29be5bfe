"""RESULTS.md's text, from about.md and what results.json has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import why
from adapters import KINDS, MORE_NAMES, NAMES
from exam import REFUSED
from pairs import PAIRS
from plan import CURVES, LADDER_ENERGIES, OPINION

from safelora_vllm.policy import Policy

Table = Mapping[str, Any]
# Who uploads what.
AUTHORS = {
    "honest": ("benign-qv",),
    "careless": ("mixed-10-qv",),
    "malicious": ("pure-qv", "chat-qv"),
    "knows the method": ("around-inputs-qv", "within-caps-qv", "masked-qv"),
}
_SETTINGS = [
    "raw-0",
    *(f"input-removal-{energy:g}" for energy in LADDER_ENERGIES),
    "safe-lora-1",
    f"opinion-{OPINION}",
]
_METHODS = {
    "both": "input removal 0.1, then Safe LoRA",
    "centred-removal": "centred oblique removal",
    "csulora": "CSULoRA",
    "input-removal": "input removal",
    "opinion": "second opinion, tokens:",
    "mean-removal": "mean-input removal",
    "random-removal": "random removal",
    "safe-lora": "Safe LoRA",
    "scaling": "scaled by",
    "selective-removal": "input removal 0.4, least similar",
    "threshold": "Safe LoRA, τ =",
}
_MEASURES = {
    "complied": "ASR",
    "over_aligned": "ASR over aligned",
    "departed": "departures",
    "over_refused": "refuses harmless",
    "exact": "exact JSON",
    "rouge1": "Rouge-1",
    "utility_lost": "utility lost",
    "loyal": "loyalty",
}
_WAYS = {
    "none": "",
    "inverse": ", multiplied by the inverse of Ĉ first",
    "half": ", half of its ranks, as one of two uploads",
    "twice": ", twice as large (`lora_alpha`)",
    "thrice": ", three times as large (`lora_alpha`)",
    "padded": ", one rank of it, four times as large, where CSULoRA keeps all",
}
_DEFENCES = ("raw-0", "safe-lora-1", "safe-lora-0.5", "input-removal-0.2", "csulora-0.95")
_CAP = 1.0  # the default of --max-relative-norm
_ROOM = 1.1  # a cap on the total norm, over the largest of the honest adapters


def text_of(about: str, figures: Table) -> str:
    """The whole page."""
    pairs = figures["pairs"]
    text = [about.strip(), "## What each setting does", *_settings(pairs), *_exam(figures)]
    text += ["## The pairs", _checks(figures["checks"])]
    for pair, table in pairs.items():
        text += [f"## {PAIRS[pair].title}", *_pair(table)]
        text += [
            f"![ASR against utility, {title(adapter)}]({pair}-{adapter}.png)" for adapter in drawn(table)
        ]
        if attacked := _attacks(table):
            text += ["### Prepared uploads", _ATTACKS, attacked]
    text += _opinion(figures["opinion"])
    text += _agreement(figures["agreement"])
    text += _risk(figures["risk"])
    if where := figures["where"]:
        text += ["## Why it works", why.TEXT, "![What is removed, and what reads it](why.png)", _where(where)]
    if minutes := figures["minutes"]:
        text += ["## Time", _minutes(minutes)]
    return "\n\n".join(text) + "\n"


def title(adapter: str) -> str:
    """An adapter in words."""
    kind, _, shape = adapter.rpartition("-")
    return f"{KINDS[kind].title}, {'q and v, r = 8' if shape == 'qv' else 'all linear, r = 16'}"


def words(treatment: str) -> str:
    """A treatment in words."""
    method, _, strength = treatment.rpartition("-")
    if treatment == "raw-0":
        return "as uploaded"
    if treatment == REFUSED:
        return REFUSED
    if treatment == "mean-removal-1":
        return _METHODS[method]
    if treatment == "safe-lora-1":
        return "Safe LoRA, all modules"
    if method in ("safe-lora", "selective-removal", "both"):
        return f"{_METHODS[method]}, {float(strength):.0%} of modules".replace("%", " %")
    return f"{_METHODS[method]} {1.0 - float(strength) if method == 'scaling' else float(strength):g}"


def drawn(table: Table) -> list[str]:
    """The adapters whose curves are drawn: the benign one is the utility of those that have none."""
    asked = [name for name in CURVES if any(t.startswith("csulora-") for t in table.get(name, {}))]
    return [name for name in asked if name != "benign-qv"]


def _settings(pairs: Table) -> list[str]:
    default = words(f"input-removal-{Policy().energy:g}")
    text = [
        "ASR over the aligned model, on the `report` half: the worst adapter of a column, its seeds' mean. "
        "Honest, careless: also the utility lost. Malicious: purely malicious, or mixed with chat. "
        f"Knows the method: trained around V, also with a penalty or a mask. The default is {default}."
    ]
    for pair, table in pairs.items():
        rows = []
        for setting in _SETTINGS:
            cells = []
            for adapters in AUTHORS.values():
                found = [table[a][setting] for a in adapters if setting in table.get(a, {})]
                if not found:
                    cells.append("")
                    continue
                worst = max(found, key=lambda row: row["over_aligned"]["mean"])
                lost = f"; lost {_cell(worst['utility_lost'])}" if "utility_lost" in worst else ""
                cells.append(_cell(worst["over_aligned"]) + lost)
            if any(cells):
                rows.append([words(setting), *cells])
        if rows:
            text += [f"### {PAIRS[pair].title}", _markdown(["setting", *AUTHORS], rows)]
    return text


def _exam(figures: Table) -> list[str]:
    replayed = figures["exam"]
    if not replayed:
        return []
    text = ["## The exam, replayed", _EXAM]
    for measure, found in replayed["measures"].items():
        rows = []
        for pair, adapters in found["pairs"].items():
            for adapter in [name for name in (*NAMES, *MORE_NAMES) if name in adapters]:
                seeds = adapters[adapter].values()
                rungs = ", ".join(words(seed["rung"]) for seed in seeds)
                lost = [seed["utility_lost"] for seed in seeds if "utility_lost" in seed]
                rows.append(
                    [
                        PAIRS[pair].title,
                        title(adapter),
                        rungs,
                        _mean(seed["raw_over_aligned"] for seed in seeds),
                        _mean(seed["over_aligned"] for seed in seeds),
                        _mean(lost) if lost else "",
                    ]
                )
        heads = [
            "pair",
            "adapter",
            "served, by seed",
            "uploaded: ASR over aligned",
            "served: ASR over aligned",
        ]
        text += [f"### By the {measure}: ε = {found['epsilon']:g}", _markdown([*heads, "utility lost"], rows)]
    return text


_EXAM = """An adapter is served by the first treatment of the ladder whose loyalty drop on the probes is at
most ε nats per token. Probes: the `choose` half of the harmful-sounding requests. ε was chosen on seed 0 of
the first pair, on the `choose` half: the largest with which nothing served goes more than 5 points beyond
the aligned model. ASR and utility are of the `report` half."""


def _checks(checks: Table) -> str:
    rows = []
    for pair, seeds in checks.items():
        for seed, halves in seeds.items():
            for half, f in halves.items():
                figures = ("asr", "refuses_harmless", "refuses_tasks", "exact", "rouge1")
                rows.append([PAIRS[pair].title, seed, half, *(f"{f[name]:.3f}" for name in figures)])
    heads = ["pair", "seed", "half", "ASR", "refuses harmless", "refuses tasks", "exact JSON", "Rouge-1"]
    return "The aligned models alone, as `check.py` measures them.\n\n" + _markdown(heads, rows)


def _pair(table: Table) -> list[str]:
    aligned = table["none"]["none"]
    text = [
        f"The aligned model alone, on these prompts: ASR {_cell(aligned['complied'])}, refuses harmless ones "
        f"{_cell(aligned['over_refused'])}."
    ]
    rows = []
    for adapter in [name for name in (*NAMES, *MORE_NAMES) if name in table]:
        for treatment in sorted(table[adapter], key=_order):
            if "." in treatment.rpartition("-")[0]:
                continue
            row = table[adapter][treatment]
            cells = [_cell(row[m]) if m in row else "" for m in _MEASURES]
            rows.append([title(adapter), words(treatment), *cells, str(len(row["seeds"]))])
    return [*text, _markdown(["adapter", "treatment", *_MEASURES.values(), "seeds"], rows)]


def _order(treatment: str) -> tuple[bool, str, float]:
    method, _, strength = treatment.rpartition("-")
    return method != "raw", method, float(strength)


_ATTACKS = """ASR, and in brackets the mean *sense* of the answers. The server had no norm cap. The column
beside a norm says what a cap would have done to the upload: `--max-relative-norm` at its default, and
`--max-total-norm` a tenth above the largest adapter that is honest or careless."""


def _attacks(table: Table) -> str:
    ordinary = [name for name in (*AUTHORS["honest"], *AUTHORS["careless"]) if name in table]
    if not ordinary:
        return ""
    total_cap = _ROOM * max(table[name]["raw-0"]["total_norm"]["mean"] for name in ordinary)
    rows = []
    for adapter in ("pure-qv", *MORE_NAMES):
        for way, said in _WAYS.items():
            found = [table.get(adapter, {}).get(f"{way}.{defence}") for defence in _DEFENCES]
            if not all(found):
                continue
            cells = [f"{row['complied']['mean']:.2f} ({row['sense']['mean']:.1f})" for row in found]
            norm, total = (found[0][name]["mean"] for name in ("norm", "total_norm"))
            capped = [
                "refused" if size > cap else "passes" for size, cap in ((norm, _CAP), (total, total_cap))
            ]
            rows.append([title(adapter) + said, *cells, f"{norm:.3g}", capped[0], f"{total:.2g}", capped[1]])
    if not rows:
        return ""
    heads = ["attack", *map(words, _DEFENCES), "largest ‖ΔW‖/‖W‖", f"norm cap {_CAP:g}"]
    return _markdown([*heads, "total norm", f"total cap {total_cap:.2g}"], rows)


def _opinion(opinions: Table) -> list[str]:
    rows = []
    for pair, table in opinions.items():
        for adapter in [name for name in NAMES if name in table]:
            for treatment, row in table[adapter].items():
                names = ("complied", "over_aligned", "utility")
                cells = [_cell(row[name]) if name in row else "" for name in names]
                rows.append([PAIRS[pair].title, title(adapter), words(treatment), *cells])
    if not rows:
        return []
    note = (
        "Where the aligned model refuses a prompt, its refusal is served. Replayed from the stored answers."
    )
    heads = ["pair", "adapter", "treatment", "ASR", "ASR over aligned", "utility"]
    return ["## A second opinion, replayed", note, _markdown(heads, rows)]


def _agreement(found: Table) -> list[str]:
    if not found:
        return []
    rows = [
        ["ASR and departures say the same of a prompt", f"{found['asr_and_departures']:.3f}"],
        ["rank correlation of ASR and loyalty drop", f"{found['asr_and_loyalty_drop']:.3f}"],
        ["points", f"{found['points']:.0f}"],
    ]
    return ["## Agreement of the measures", _markdown(["what", "figure"], rows)]


def _risk(found: Table) -> list[str]:
    if not found:
        return []
    rows = [
        [PAIRS[pair].title, title(adapter), ", ".join(f"{z:.1f}" for z in values)]
        for pair, adapters in found["scores"].items()
        for adapter, values in adapters.items()
    ]
    note = (
        "z below 0: an adapter undoes what alignment did. "
        f"AUC over all adapters, honest and harmful: {found['auc']:.2f}."
    )
    return ["## The sign-flip risk score", note, _markdown(["pair", "adapter", "z, by seed"], rows)]


def _where(where: Table) -> str:
    parts = [["r₁ and the mean input", name, f"{cosine:.2f}"] for name, cosine in where[""].items()]
    for adapter in [name for name in where if name]:
        parts += [[title(adapter), name, f"{share:.4f}"] for name, share in where[adapter].items()]
    return _markdown(["of", "what", "figure"], parts)


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    return f"{sum(found) / len(found):.2f}"


def _cell(figure: Table) -> str:
    return f"{figure['mean']:.2f} [{figure['low']:.2f}, {figure['high']:.2f}]"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _minutes(minutes: Table) -> str:
    rows = [[what, f"{took:.0f}"] for what, took in minutes.items()]
    total = f"{sum(minutes.values()):.0f}"
    note = "On two CPU cores, summed over all runs that it took; raw figures of one machine."
    return f"{note}\n\n" + _markdown(["part", "minutes"], [*rows, ["all", total]])
