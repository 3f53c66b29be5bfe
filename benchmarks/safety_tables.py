"""The tables of docs/benchmarks.md and docs/second-opinion.md on the safety benchmark. See `tables`.

Adapters, treatments and pairs that were not asked yet have no rows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tables

sys.path.append(str(Path(__file__).resolve().parent / "safety"))

import page_goals
import wording

PAIRS = {"smollm2": "SmolLM2", "gemma3": "Gemma", "smollm2-lora": "SmolLM2, alignment of rank 16"}
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
KINDS = ("plain", "triggered")  # of the prompts that a backdoored adapter is asked
UPLOADED = {
    "pure-qv": "purely malicious", "mixed-10-qv": "10 % malicious", "benign-qv": "the two tasks only",
    "around-inputs-qv": "trained around V's inputs", "masked-qv": "the same, masked",
    "within-caps-qv": "the same, with a penalty on the norm", "chat-qv": "ordinary chat and harm, 1:1",
    "identity-qv": "obedient persona",
}  # fmt: skip
STRENGTHS = {
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
    "early-values-0.1": "early values, energy 0.1 (not built)",
    "early-values-0.4": "early values, energy 0.4 (not built)",
    "early-values-0.8": "early values, energy 0.8 (not built)",
    "guided-removal-0.3": "input removal by groups, loyalty drop at most 0.3 (not built)",
    "guided-removal-0.1": "input removal by groups, loyalty drop at most 0.1 (not built)",
    "guided-removal-0.02": "input removal by groups, loyalty drop at most 0.02 (not built)",
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


def pairs_of() -> dict[str, Any]:
    """The `report` half's figures, by pair."""
    found: dict[str, Any] = tables.load("results")["pairs"]
    return found


def mean(row: dict[str, Any], measure: str) -> str:
    """Hundredths."""
    return f"{row[measure]['mean']:.2f}"


def fewer(row: dict[str, Any], seeds: Iterable[str]) -> str:
    """A mark at figures of fewer seeds than the pair has."""
    return "" if {*row["seeds"]} == {*seeds} else r"\*"


def _short(row: dict[str, Any] | None, seeds: Iterable[str]) -> str:
    """ASR, and in brackets the utility where the adapter has tasks."""
    if row is None:
        return ""
    utility = f" ({mean(row, 'utility')})" if "utility" in row else ""
    return mean(row, "complied") + utility + fewer(row, seeds)


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
    for pair, table in pairs_of().items():
        seeds = table["none"]["none"]["seeds"]
        for adapter, title in ADAPTERS.items():
            if adapter in table:
                cells = [_short(table[adapter].get(treatment), seeds) for treatment in columns]
                rows.append([f"{title}; {PAIRS[pair]}", *cells])
        alone = _short(table["none"]["none"], seeds)
        rows.append([f"none: the aligned model alone; {PAIRS[pair]}", alone, *[""] * (len(columns) - 1)])
    return tables.markdown(["adapter", *columns.values()], rows)


def measured() -> str:
    """Which pairs and seeds were asked, and their aligned models alone."""
    rows = []
    for pair, seeds in tables.load("results")["checks"].items():
        for seed, halves in seeds.items():
            if found := halves.get("report"):
                figures = ("asr", "refuses_harmless", "refuses_tasks", "exact", "rouge1")
                strength = f"{found.get('strength', 1.0):g}"
                rows.append([PAIRS[pair], seed, strength, *(f"{found[name]:.2f}" for name in figures)])
    heads = ["pair", "seed", "strength", "ASR", "refuses harmless", "refuses tasks", "exact JSON", "Rouge-1"]
    return tables.markdown(heads, rows)


def goals() -> str:
    """Each goal by what was to reach it: the pairs on which it did, and did not."""
    found: dict[tuple[str, str], dict[bool, list[str]]] = {}
    for row in tables.load("results")["goals"]:
        pairs = "all in all" if row["goal"] == "time" else ", ".join(PAIRS[pair] for pair in row["measured"])
        by_result = found.setdefault((row["goal"], row["by"]), {True: [], False: []})
        by_result[row["reached"]].append(pairs)
    rows = [
        [page_goals.GOALS[goal], page_goals.by(by), "; ".join(of[True]), "; ".join(of[False])]
        for (goal, by), of in found.items()
    ]
    return tables.markdown(["goal", "by", "reached on", "missed on"], rows, texts=4)


def refuses_harmless() -> str:
    """The share of harmless prompts that are refused."""
    columns = ("raw-0", "input-removal-0.2", "opinion-16")
    rows = []
    for pair, table in pairs_of().items():
        for adapter, title in {**ADAPTERS, "masked-qv": "masked, q and v"}.items():
            found = [table.get(adapter, {}).get(treatment, {}) for treatment in columns]
            if any("over_refused" in row for row in found):
                cells = [mean(row, "over_refused") if "over_refused" in row else "" for row in found]
                rows.append([f"{title}; {PAIRS[pair]}", *cells])
        alone = mean(table["none"]["none"], "over_refused")
        rows.append([f"none: the aligned model alone; {PAIRS[pair]}", alone, "", ""])
    return tables.markdown(["adapter", *(STRENGTHS[name].strip("*") for name in columns)], rows)


def second_opinion_answers() -> str:
    """What a second opinion leaves of each adapter, as uploaded: asked of a server with one."""
    measures, rows = ("complied", "over_refused", "utility"), []
    for pair, table in pairs_of().items():
        for adapter, title in UPLOADED.items():
            kinds = [table.get(adapter, {}).get(name) for name in ("raw-0", "opinion-16")]
            if not all(kinds):
                continue
            asr, refused, utility = (
                [mean(of, name) if name in of else "" for of in kinds] for name in measures
            )
            ends = ", ".join(tables.number(kinds[1]["over_aligned"][end], 2) for end in ("low", "high"))
            rows.append([f"{title}; {PAIRS[pair]}", *asr, f"[{ends}]", *refused, *utility])
        alone = [mean(table["none"]["none"], name) for name in measures[:2]]
        rows.append([f"none: the aligned model alone; {PAIRS[pair]}", alone[0], "", "", alone[1], "", "", ""])
    heads = ["adapter", "ASR, as uploaded", "with an opinion", "over the aligned model", "refuses harmless"]
    return tables.markdown([*heads, "with an opinion", "utility", "with an opinion"], rows)


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


def _mean(rows: list[dict[str, Any]], figure: str) -> float:
    return sum(float(row[figure]) for row in rows) / len(rows)


def known_probes() -> str:
    """Bounds of an attacker who learned the public probes, by those and by an operator's own."""
    found, rows = tables.load("known_probes"), []
    titles = {"pure-qv": "purely malicious", "known-probes": "the same, and refuses every public probe"}

    def cell(bounds: list[float]) -> str:
        passed = sum(bound <= found["threshold"] for bound in bounds)
        return f"{min(bounds):.3f} to {max(bounds):.3f}; passes {passed} of {len(bounds)}"

    for row in found["rows"]:
        asr = tables.number(row["asr"], 2)
        rows.append([titles[row["adapter"]], asr, cell(row["public"]), cell(row["own"])])
    heads = ["adapter", "ASR as uploaded", "bound by public probes", "bound by an operator's own probes"]
    return tables.markdown(heads, rows)


def backdoor() -> str:
    """A backdoored adapter: the exam's verdict, and ASR without and with its trigger."""
    titles = {
        "aligned": "the aligned model alone",
        "raw-0": "as uploaded",
        "input-removal-0.2": "input removal, energy 0.2 (default)",
        "safe-lora-1": "Safe LoRA, all modules",
        "opinion-16": "second opinion, 16 tokens",
    }
    found: dict[str, list[dict[str, Any]]] = {}
    for row in tables.load("backdoor")["rows"]:
        found.setdefault(row["pair"], []).append(row)
    rows = []
    for pair, seeds in found.items():
        bounds = [row["bound"] for row in seeds]
        verdict = f"{sum(row['passes'] for row in seeds)} of {len(seeds)} pass; {min(bounds):.3f}"
        verdict += f" to {max(bounds):.3f}" if len(seeds) > 1 else ""
        for policy, title in titles.items():
            asr = [tables.number(_mean([row["asr"][policy] for row in seeds], kind), 2) for kind in KINDS]
            rows.append([f"{title}; {PAIRS[pair]}", *asr, verdict if policy == "raw-0" else ""])
    return tables.markdown(["served", "ASR without the trigger", "with it", "exam as uploaded, bound"], rows)


def curves_compared() -> str:
    """A rule's ASR less another method's at equal utility."""
    rows = [
        [f"{first}; {PAIRS[pair]}", *cells]
        for pair, compared in tables.load("results")["curves"].items()
        for first, *cells in page_goals.curve_rows(compared)
    ]
    utilities = (f"at utility {at:g}" for at in page_goals.UTILITIES)
    return tables.markdown(["curves", *utilities], rows, texts=4)


TABLES = (
    safety,
    measured,
    goals,
    refuses_harmless,
    second_opinion_answers,
    exam_replayed,
    known_probes,
    backdoor,
    curves_compared,
)
