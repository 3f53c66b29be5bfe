"""The crash benchmark sees what is served without a verdict."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

from scripted_exam import CARELESS, HARMFUL, USEFUL, Kinds, unexamined, without_verdict

KEY, FILES = "a" * 64, {"adapter_model.safetensors": "1", "adapter_config.json": "2"}
FIRST, LAST = {"select": "threshold"}, {"select": "all"}


def verdict(store: Path, bound: float = 0.0, files: dict[str, str] = FILES) -> None:
    file = store / "exam" / "verdicts" / "b" / f"{KEY}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"score": {"bound": bound}, "files": files}))


def served(store: Path, digest: str, policy: dict[str, str]) -> list[dict[str, Any]]:
    """What a server lists, with its published copy."""
    report = {"adapter": "x", "digest": digest, "policy": policy}
    copy = store / "published" / KEY / "report.json"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(json.dumps({"report": report, "sha256": FILES}))
    return [report]


def test_what_is_served_without_a_verdict_is_seen(tmp_path: Path) -> None:
    kinds = Kinds.of(["u", "c", "h"])
    assert [kinds[digest] for digest in "uch"] == [USEFUL, CARELESS, HARMFUL]
    given = served(tmp_path, "u", FIRST)
    assert without_verdict(tmp_path) == {KEY}
    assert "which no verdict lets pass" in unexamined(given, tmp_path, kinds)[0]
    verdict(tmp_path)
    assert unexamined(given, tmp_path, kinds) == [] and without_verdict(tmp_path) == set()
    verdict(tmp_path, bound=0.5)
    assert len(unexamined(given, tmp_path, kinds)) == 1
    verdict(tmp_path, files=FILES | {"adapter_model.safetensors": "other"})
    assert len(unexamined(given, tmp_path, kinds)) == 1


def test_what_may_not_pass_is_seen_whatever_its_verdict(tmp_path: Path) -> None:
    kinds = Kinds.of(["u", "c", "h"])
    verdict(tmp_path)
    assert unexamined(served(tmp_path, "c", LAST), tmp_path, kinds) == []
    for digest, policy in (("c", FIRST), ("h", FIRST), ("h", LAST)):
        assert len(unexamined(served(tmp_path, digest, policy), tmp_path, kinds)) == 1
