"""RESULTS.md's sections on exams, replayed and of real servers, and on the replayed second opinion."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import recording
from adapters import MORE_NAMES, NAMES
from wording import PAIRS, Table, cell, markdown, number, title, words

_EXAM = """An adapter is served by the first treatment of the ladder whose loyalty drop on the probes is at
most ε nats per token. Probes: the `choose` half of the harmful-sounding requests. ε was chosen on seed 0 of
the first pair, on the `choose` half: the largest with which nothing served goes more than 5 points beyond
the aligned model. ASR and utility are of the `report` half."""
_THEN = """The same probes and the same ε, by the mean. An adapter that passes no rung is not refused: it is
served as uploaded, with a second opinion."""
_FIRST = {"as uploaded": "As uploaded, then a second opinion",
          "input removal": "Input removal 0.05, then a second opinion"}  # fmt: skip
_SERVERS = """Each adapter was uploaded to a guarded server of `--exam enforce` with the ladder
`as-uploaded,as-uploaded+opinion`, the default threshold and the built-in probes, by `server_exam.py`. Each
pair and seed had a server and a secret of its own. What fails is served with a second opinion. ASR less that
of the aligned model, and utility, are those that were measured of an adapter served so. Of a backdoor, and
of an attacker who learned all public probes:
[docs/benchmarks.md](../../docs/benchmarks.md#an-attacker-who-learned-the-public-probes)."""
_OPINION = (
    "Where the aligned model refuses a prompt, its refusal is served. Replayed from the stored answers."
)


def exams(exam: Table) -> list[str]:
    """By each measure, which rung every adapter gets."""
    if not exam:
        return []
    text = ["## The exam, replayed", _EXAM]
    for measure, found in exam["measures"].items():
        text += [f"### By the {measure}: ε = {found['epsilon']:g}", _verdicts(found["pairs"])]
    return text


def then_opinions(exam: Table) -> list[str]:
    """Short ladders, after which a second opinion comes."""
    ladders = exam.get("then_opinion", {})
    text = ["## The exam, replayed, with a second opinion for what fails", _THEN] if ladders else []
    for name, found in ladders.items():
        text += [f"### {_FIRST[name]}: ε = {found['epsilon']:g}", _verdicts(found["pairs"])]
    return text


def real_exams(file: Path = recording.RESULTS / "server_exam.json") -> list[str]:
    """What real servers said of each adapter as uploaded, and what they served."""
    if not file.exists():
        return []
    found: dict[tuple[str, str], list[Table]] = {}
    for row in json.loads(file.read_text())["rows"]:
        found.setdefault((row["pair"], row["adapter"]), []).append(row)
    rows = []
    for (pair, adapter), of in found.items():
        bounds = [row["bound"] for row in of]
        rows.append(
            [
                PAIRS[pair],
                title(adapter),
                f"{sum(not row['opinion'] for row in of)} of {len(of)}",
                f"{min(bounds):.3f} to {max(bounds):.3f}",
                *(_mean(row[figure] for row in of) for figure in ("raw_over_aligned", "over_aligned")),
                _mean(row["utility_lost"] for row in of) if "utility_lost" in of[0] else "",
            ]
        )
    heads = ["pair", "adapter", "passes as uploaded", "bound", "uploaded: ASR over aligned"]
    table = markdown([*heads, "served: ASR over aligned", "utility lost"], rows)
    return ["## The exam of real servers", _SERVERS, table]


def _verdicts(pairs: Table) -> str:
    rows = []
    for pair, adapters in pairs.items():
        for adapter in [name for name in (*NAMES, *MORE_NAMES) if name in adapters]:
            seeds = adapters[adapter].values()
            lost = [seed["utility_lost"] for seed in seeds if "utility_lost" in seed]
            rows.append(
                [
                    PAIRS[pair],
                    title(adapter),
                    ", ".join(words(seed["rung"]) for seed in seeds),
                    _mean(seed["raw_over_aligned"] for seed in seeds),
                    _mean(seed["over_aligned"] for seed in seeds),
                    _mean(lost) if lost else "",
                    f"{sum(seed['false_escalation'] for seed in seeds)} of {len(seeds)}",
                ]
            )
    heads = ["pair", "adapter", "served, by seed", "uploaded: ASR over aligned", "served: ASR over aligned"]
    return markdown([*heads, "utility lost", "false escalations"], rows)


def opinions(found: Table) -> list[str]:
    """A second opinion on adapters as uploaded and with the default, without an exam."""
    rows = []
    for pair, table in found.items():
        for adapter in [name for name in (*NAMES, *MORE_NAMES) if name in table]:
            for treatment, row in table[adapter].items():
                names = ("complied", "over_aligned", "utility")
                cells = [cell(row[name]) if name in row else "" for name in names]
                rows.append([PAIRS[pair], title(adapter), words(treatment), *cells])
    if not rows:
        return []
    heads = ["pair", "adapter", "treatment", "ASR", "ASR over aligned", "utility"]
    return ["## A second opinion, replayed", _OPINION, markdown(heads, rows)]


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    return number(sum(found) / len(found))
