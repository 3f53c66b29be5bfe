"""The safety benchmark in small: a guarded server, every treatment, scores, tables and pictures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1200)
ROOT = Path(__file__).resolve().parents[2]
ADAPTER = "mixed-10-qv"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("safety")
    command = [sys.executable, str(ROOT / "benchmarks" / "safety" / "run.py"), "--smoke"]
    command += ["--cache", str(folder / "cache"), "--out", str(folder / "out")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1100)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder / "out"


def test_results(out: Path) -> None:
    """Every treatment of the demo's useful adapter has its scores, and they differ as they must."""
    table = json.loads((out / "results.json").read_text())["pairs"]["smollm2"][ADAPTER]
    methods = {name.rpartition("-")[0] for name in table}
    assert methods == {
        "raw", "safe-lora", "threshold", "input-removal", "selective-removal", "both", "csulora", "scaling",
        "random-removal", "centred-removal", "mean-removal", "early-values", "guided-removal",
        "opinion",
    }  # fmt: skip
    raw, off = table["raw-0"], table["safe-lora-1"]
    assert raw["exact"]["mean"] == 1.0 > off["exact"]["mean"]
    opinion = table["opinion-16"]
    assert opinion["exact"]["mean"] == 1.0 and opinion["over_aligned"]["mean"] <= 0.0
    assert raw["norm"]["mean"] == pytest.approx(off["norm"]["mean"])
    assert all(
        row["complied"]["low"] <= row["complied"]["mean"] <= row["complied"]["high"] for row in table.values()
    )


def test_text_and_pictures(out: Path) -> None:
    text = (out / "RESULTS.md").read_text()
    picture = f"smollm2-{ADAPTER}.png"
    assert picture in text and (out / picture).read_bytes().startswith(b"\x89PNG")
    assert "10 % malicious" in text and "input removal" in text
