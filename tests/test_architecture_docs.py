"""docs/architecture.md: the walk of an adapter names files and functions that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\|[^|]*\| `([\w/]+\.py)` \| `([\w.]+)` \|", re.M)
STEPS = ROW.findall((ROOT / "docs" / "architecture.md").read_text())


def defined(file: Path) -> set[str]:
    """Functions and classes of a module, and methods as ``Class.method``."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
            found |= {f"{node.name}.{method.name}" for method in methods}
    return found


def test_the_walk_has_its_steps() -> None:
    assert len(STEPS) > 30


@pytest.mark.parametrize(("file", "name"), STEPS)
def test_each_step_names_what_exists(file: str, name: str) -> None:
    assert name in defined(ROOT / "safelora_vllm" / file)
