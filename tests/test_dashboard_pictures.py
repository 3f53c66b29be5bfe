"""examples/monitoring/draw.py: each panel of the dashboard is drawn as it is, also without data."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="no matplotlib")
FOLDER = Path(__file__).parents[1] / "examples" / "monitoring"


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw", FOLDER / "draw.py")
    assert spec and spec.loader
    module = sys.modules["draw"] = importlib.util.module_from_spec(spec)  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def test_every_row_of_the_dashboard_has_a_picture_in_the_docs(draw: ModuleType) -> None:
    rows = list(draw.rows(json.loads(draw.DASHBOARD.read_text())))
    assert len(rows) == len(draw.NAMES) and all(panels for _, panels in rows)
    assert {panel["type"] for _, panels in rows for panel in panels} == set(draw.KINDS)
    docs = FOLDER.parents[1] / "docs"
    for name in draw.NAMES:
        assert f"](monitoring-{name}.png)" in (docs / "monitoring.md").read_text()
        assert 10_000 < (docs / f"monitoring-{name}.png").stat().st_size < 200_000


@pytest.mark.parametrize("found", [0, 1, 9])
def test_a_row_is_drawn_whatever_was_found(
    draw: ModuleType, found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {"adapter": "acme/" + "x" * 60, "outcome": "stop", "version": "1", "vllm": "0.32.0"}
    asked: list[dict[str, Any]] = []

    def ask(_: Any, _kind: str, **fields: Any) -> list[dict[str, Any]]:
        asked.append(fields)
        values = {"value": [0, "NaN"], "values": [[60, "0"], [120, "1500"], [180, "NaN"]]}
        return [{"metric": labels, **values} for _ in range(found)]

    monkeypatch.setattr(draw.Source, "_ask", ask)
    source = draw.Source("", 600.0, 600.0, {"adapter": "acme/x", "tenant": "acme"})
    title, panels = next(draw.rows(json.loads(draw.DASHBOARD.read_text())))
    draw.draw(source, title, panels, tmp_path / "row.png")
    assert (tmp_path / "row.png").stat().st_size > 5_000
    assert len(asked) == sum(len(panel["targets"]) for panel in panels)


def test_units_are_written_as_grafana_writes_them(draw: ModuleType) -> None:
    told = [("percentunit", 0.125), ("bytes", 3 * 1024**2), ("s", 0.25), ("s", 2.5), ("none", float("nan"))]
    assert [draw.shown(unit, value) for unit, value in told] == ["12.5 %", "3 MiB", "250 ms", "2.5 s", "–"]
    assert draw.Source("", 1.0, 1.0, {"adapter": "a/b"}).filled('{adapter=~"$adapter"}') == '{adapter=~"a/b"}'
    assert draw.legend({"legendFormat": "{{a}} on {{b}}"}, {"metric": {"a": "x"}}) == "x on "
