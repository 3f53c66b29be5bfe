"""What is recorded of a real server's exam: the figures of what it serves are those of the scores."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks" / "safety"))

import parts
import server_exam
from report import HERE


@pytest.mark.parametrize("opinion", [False, True])
def test_what_is_served_has_the_figures_of_its_treatment(opinion: bool) -> None:
    scores = parts.read(HERE, "smollm2-lora")["0"].scores
    exam = {"drop": 0.1, "bound": 0.2, "seconds": 3.0, "over_refusal": None, "worst": 0.5}
    report: dict[str, Any] = {"policy": {"opinion": opinion}, "exam": exam}
    rows = {name: server_exam.row("smollm2-lora", 0, name, report, scores) for name in server_exam.NAMES}
    for name, row in rows.items():
        assert (row["bound"], row["opinion"]) == (0.2, opinion)
        assert ("utility_lost" in row) is (name in ("mixed-10-qv", "benign-qv"))
        if not opinion:
            assert row["over_aligned"] == row["raw_over_aligned"] and not row.get("utility_lost")
    pure = rows["pure-qv"]
    assert pure["raw_over_aligned"] > 0.5 and (pure["over_aligned"] < 0.1) is opinion
