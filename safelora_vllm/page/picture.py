"""A report as a picture: the three heat maps of the page side by side.

matplotlib draws it, an extra: names need a font, and a renderer of fonts of our own would be worth less.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_vllm.errors import UsageError, codes_of
from safelora_vllm.page.export import _write

if TYPE_CHECKING:
    from safelora_vllm.report import ModuleReport, Report

_LAYER = re.compile(r"(.*?)\.(\d+)\.(.+)")
_USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_MOST_NUMBERS = 400  # cells of a map that has its numbers in it


def write_png(report: Report, file: Path) -> None:
    """Draw a report's heat maps.

    Raises:
        UsageError: matplotlib is not installed, the report has no figures, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "a picture needs matplotlib: pip install '.[picture]' in the checkout, or use "
            "--html, which needs nothing"
        ) from None
    if not report.modules:
        codes = ", ".join(codes_of(report.reasons))
        raise UsageError(
            f"there is nothing to draw: {report.adapter!r:.200} was refused before it was measured ({codes})"
        )
    rows, columns, cells = arranged(report.modules)
    wide, high = max(3.2, 0.55 * len(columns)), max(2.2, 0.2 * len(rows))
    figure = Figure(figsize=(3 * wide + 1, high + 1.6), dpi=120, layout="constrained")
    projected = f"{report.count('projected')} of {len(report.modules)} modules projected"
    answer = "accepted" if report.accepted else "refused"
    unprojected = "" if report.policy.enforcing else f", UNPROJECTED ({report.policy.mode})"
    figure.suptitle(
        f"{_plain(report.adapter)}: {answer}{unprojected}; {projected}\n{report.policy.summary}", fontsize=10
    )
    for axes, (title, values, colours, centred) in zip(figure.subplots(1, 3), _measures(cells), strict=True):
        _draw(figure, axes, title, values, colours, centred, rows, columns)
    target = io.BytesIO()
    figure.savefig(target, format="png", metadata={"Software": None})
    _write(file, target.getvalue())


def arranged(modules: list[ModuleReport]) -> tuple[list[str], list[str], list[list[ModuleReport | None]]]:
    """Layers, kinds of modules, and the module of each pair, as the page has them."""
    places = {}
    for module in modules:
        found = _LAYER.fullmatch(module.name)
        places[module.name] = (found[1], int(found[2]), found[3]) if found else ("", -1, module.name)
    rows = sorted({place[:2] for place in places.values()}, key=lambda row: (row[1] < 0, row[1], row[0]))

    def usual(name: str) -> int:
        last = name.rpartition(".")[2]
        return _USUAL.index(last) if last in _USUAL else len(_USUAL)

    columns = sorted(dict.fromkeys(place[2] for place in places.values()), key=usual)
    at = {places[module.name]: module for module in modules}
    cells = [[at.get((*row, column)) for column in columns] for row in rows]
    short = [column.rpartition(".")[2] for column in columns]
    layers = [str(row[1]) if row[1] >= 0 else "–" for row in rows]
    return layers, short if len(set(short)) == len(short) else columns, cells


def _measures(cells: list[list[ModuleReport | None]]) -> list[tuple[str, list[list[float]], str, bool]]:
    def over_chance(module: ModuleReport) -> float | None:
        return None if module.similarity is None else module.similarity - module.null_similarity

    def column(value: Any) -> list[list[float]]:
        nan = float("nan")
        found = [[value(module) if module else None for module in row] for row in cells]
        return [[nan if number is None else number for number in row] for row in found]

    return [
        ("similarity over chance", column(over_chance), "PuOr_r", True),
        ("retained norm", column(lambda module: module.retained), "cividis", False),
        ("relative norm", column(lambda module: module.relative_norm), "cividis", False),
    ]


def _draw(
    figure: Any, axes: Any, title: str, values: list[list[float]], colours: str, centred: bool,
    rows: list[str], columns: list[str],
) -> None:  # fmt: skip
    known = [value for row in values for value in row if value == value]
    most = max(map(abs, known), default=0.0) or 1e-9
    low, high = (
        (-max(0.05, most), max(0.05, most))
        if centred
        else (0.0, max(1.0, most) if "retained" in title else most)
    )
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    axes.set_title(title, fontsize=9)
    axes.set_xticks(
        range(len(columns)), [_plain(name) for name in columns], rotation=60, ha="right", fontsize=7
    )
    step = max(1, len(rows) // 40)
    axes.set_yticks(range(0, len(rows), step), rows[::step], fontsize=7)
    axes.set_ylabel("layer", fontsize=8)
    if len(rows) * len(columns) <= _MOST_NUMBERS:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value == value:
                    red, green, blue, _ = image.cmap(image.norm(value))
                    bright = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
                    text = (
                        f"{value:+.2f}" if centred else f"{value:.2f}" if value >= 0.0995 else f"{value:.3f}"
                    )
                    axes.text(
                        x,
                        y,
                        text,
                        ha="center",
                        va="center",
                        fontsize=5.5,
                        color="black" if bright else "white",
                    )
    figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)


def _plain(name: str) -> str:
    """A name without characters that cannot be seen, and without matplotlib's mathematics."""
    shown = name if name.isprintable() else ascii(name)
    return shown.replace("$", r"\$")
