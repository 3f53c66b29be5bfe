"""The measured figures in the documentation are those of the files under benchmarks/.

Checked: every table between marks in the pages that benchmarks/tables.py writes, cell by cell; README's
table of results, row by row; that the prose of these pages and of docs/exam.md has no other figures with a
decimal point than settings; RESULTS.md.
Not checked: pictures, and what commands print in examples.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import policy_tables
import tables

from safelora_vllm.policy import Policy

ROOT = tables.ROOT
# Settings, shapes and versions that prose may name; measured figures stand in tables.
SETTINGS = {
    "0.05", "0.1", "0.2", "0.3", "0.35", "0.4", "0.5", "0.8", "0.95", "0.99", "0.006", "0.28", "0.32", "0.33",
    "2.11", "2.13",
}  # fmt: skip


@pytest.mark.parametrize("document", tables.DOCUMENTS, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_files(document: Path) -> None:
    text = document.read_text()
    assert tables.BLOCK.search(text)
    assert text == tables.written(text), "run python benchmarks/tables.py"


def test_every_table_is_in_a_document() -> None:
    found = {
        block[1] for document in tables.DOCUMENTS for block in tables.BLOCK.findall(document.read_text())
    }
    assert found == set(tables.tables())


def test_every_file_of_figures_is_cited() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"Figures: [`{file.name}`]" in text, file.name


@pytest.mark.parametrize(
    "document", [*tables.DOCUMENTS, ROOT / "docs" / "exam.md"], ids=lambda path: path.name
)
def test_prose_has_no_figures_but_settings(document: Path) -> None:
    text = re.sub(r"^```.*?^```", "", tables.BLOCK.sub("", document.read_text()), flags=re.S | re.M)
    text = re.sub(r"`[^`\n]*`|\]\([^)]*\)|arXiv [\d.]+", "", text)
    assert set(re.findall(r"(?<![\d.])\d+\.\d+", text)) <= SETTINGS


def cells(adapter: str, measure: str) -> list[str]:
    """As uploaded, by the default policy, by Safe LoRA on all modules, and with a second opinion alone.

    Each on all pairs.
    """
    found = [of[adapter] for of in tables.load("results")["pairs"].values()]
    treatments = ("raw-0", f"input-removal-{Policy().energy:g}", "safe-lora-1", "opinion-16")
    return [" / ".join(f"{of[treatment][measure]['mean']:.2f}" for of in found) for treatment in treatments]


def readme_rows() -> dict[str, list[str]]:
    """What README's table of results has to say: a part of each row's label, and its figures."""
    hostile = safety_totals()
    kinds = tables.load("hot_load")["kinds"].values()
    first = " / ".join(f"{of['measures']['first load']['guarded_over_unguarded']:.1f}" for of in kinds)
    on_gpu = tables.load("gpu_serving")["ratios"]
    return {
        "10 % malicious data": cells("mixed-10-qv", "complied"),
        "own tasks": cells("mixed-10-qv", "utility"),
        "purely malicious adapter": cells("pure-qv", "complied"),
        "trained around the default": cells("around-inputs-qv", "complied"),
        "hostile adapters": [
            f"{hostile['hurt']} of {hostile['unguarded cases']}",
            f"{hostile['guarded hurt']} of {hostile['cases']}",
        ],
        "time of a first load": ["1", first],
        "while nothing is loaded": ["1", f"{on_gpu['quiet, p50_ms']:.2f}"],
        "longest pause of a stream": ["1", f"{on_gpu['loading new content, max_ms']:.2f}"],
        "time of a load under 8 streams": ["1", f"{on_gpu['load_s']:.1f}"],
    }


def safety_totals() -> dict[str, int]:
    rows = tables.load("hostile")["rows"].values()
    hurt = ("disturbed", "hung", "died")
    return {
        "cases": sum(row["cases"] for row in rows),
        "unguarded cases": sum(count for row in rows for count in row["unguarded"].values()),
        "hurt": sum(row["unguarded"].get(outcome, 0) for row in rows for outcome in hurt),
        "guarded hurt": sum(row["guarded"].get(outcome, 0) for row in rows for outcome in hurt),
    }


def test_the_results_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    (section,) = re.findall(r"^## Results\n(.*?)^## ", text, re.S | re.M)
    shown = {
        label.strip(): [cell.strip() for cell in rest.split("|") if cell.strip()]
        for label, rest in re.findall(r"^\| ([^|]+)\|(.*)\|$", section, re.M)
        if re.search(r"\d", rest)
    }
    expected = readme_rows()
    assert len(shown) == len(expected)
    for part, figures in expected.items():
        assert [found for label, found in shown.items() if part in label] == [figures], part
    alone = [of["none"]["none"] for of in tables.load("results")["pairs"].values()]
    said = re.findall(r"aligned models alone answer ([\d. /]+) .* score ([\d. /]+\d)", section)
    wanted = [" / ".join(f"{of[m]['mean']:.2f}" for of in alone) for m in ("complied", "utility")]
    assert said == [tuple(wanted)]


def test_the_attacks_caps_are_those_of_the_safety_benchmark() -> None:
    """Both state the total cap in a heading."""
    results = (ROOT / "benchmarks" / "safety" / "RESULTS.md").read_text()
    (cap,) = re.findall(r"total cap [\d.]+", policy_tables.attacks())
    assert f"| {cap} |" in results
