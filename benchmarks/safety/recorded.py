"""Pairs are measured one by one: what was recorded of those that there are no scores of stays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import goals
import risk
from pairs import PAIRS

Table = Mapping[str, Any]
BY_PAIR = ("pairs", "choose", "checks", "opinion", "curves", "agreement")


def read(folder: Path) -> Table:
    """results.json of a folder, or nothing."""
    file = folder / "results.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def epsilons(recorded: Table) -> dict[str, float]:
    """ε by measure, as the first pair's first seed decided it."""
    return {name: of["epsilon"] for name, of in recorded.get("exam", {}).get("measures", {}).items()}


def together(recorded: Table, figures: Table, new: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """All pairs' figures. Those of a pair that there are scores of replace all that was recorded of it.

    new: the seeds that this run's cache has, by pair: it has their time as well.
    """
    found = {name: _pairs(recorded.get(name, {}), figures[name]) for name in BY_PAIR}
    measured = set(figures["pairs"])
    minutes = {
        what: took
        for what, took in recorded.get("minutes", {}).items()
        if not _is_replaced(*goals.part(what), new)
    }
    rows = [row for row in recorded.get("goals", []) if row["goal"] != "time"]
    found |= {
        "exam": _exams(recorded.get("exam", {}), figures["exam"]),
        "risk": _risks(_pairs(recorded.get("risk", {}).get("scores", {}), figures["risk"])),
        "where": figures["where"] or recorded.get("where", {}),
        "minutes": minutes | figures["minutes"],
        "goals": [row for row in rows if goals.pair_of(row) not in measured] + list(figures["goals"]),
    }
    found["goals"] += goals.time(found["minutes"])
    found["goals"].sort(key=lambda row: (goals.ORDER.index(row["goal"]), _place(goals.pair_of(row))))
    return found


def _is_replaced(pair: str, seeds: str, new: Mapping[str, Sequence[str]]) -> bool:
    """Whether a run whose cache has these seeds has the time of this part, too."""
    return bool(new.get(pair)) and {*seeds.split()} <= {*new[pair]}


def _place(pair: str) -> int:
    return list(PAIRS).index(pair)


def _pairs(before: Table, now: Table) -> dict[str, Any]:
    both = {**before, **now}
    return {pair: both[pair] for pair in PAIRS if pair in both}


def _exams(before: Table, now: Table) -> dict[str, Any]:
    if not (before and now):
        return dict(now or before)
    found: dict[str, Any] = {"ladder": now["ladder"]}
    for kind in ("measures", "then_opinion"):
        found[kind] = {
            name: {**of, "pairs": _pairs(before[kind].get(name, {}).get("pairs", {}), of["pairs"])}
            for name, of in now[kind].items()
        }
    return found


def _risks(scores: Table) -> dict[str, Any]:
    """The sign-flip scores, and their AUC over all pairs."""
    harmful, honest = [], []
    for by_adapter in scores.values():
        for adapter, values in by_adapter.items():
            (honest if adapter in goals.HONEST else harmful).extend(values)
    return {"scores": scores, "auc": risk.auc(harmful, honest)} if harmful and honest else {}
