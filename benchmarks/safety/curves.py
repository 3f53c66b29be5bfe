"""Pictures: what each method's strength buys, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

BENIGN = "benign-qv"
_STYLES = {
    "safe-lora": ("Safe LoRA, share of modules", "tab:blue", "o"),
    "input-removal": ("input removal, energy", "tab:red", "s"),
    "csulora": ("CSULoRA, energy", "tab:green", "D"),
    "scaling": ("scaling, by how much less", "tab:gray", "v"),
    "random-removal": ("random removal, as many directions", "tab:brown", "x"),
}


def draw(table: dict[str, Any], adapter: str, title: str, path: Path) -> None:
    """ASR over utility: of the adapter itself, or where it has none, of the benign adapter so treated."""
    own = "utility" in table[adapter]["raw-0"]
    useful = table[adapter] if own else table.get(BENIGN, {})
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=110)
    for method, (label, colour, marker) in _STYLES.items():
        points = _points(table[adapter], useful, method)
        if len(points) < 2:
            continue
        x, y = [p["x"]["mean"] for p in points], [p["y"]["mean"] for p in points]
        axes.plot(x, y, color=colour, marker=marker, label=label, linewidth=1.2, markersize=5)
        errors = [[abs(p["y"][side] - p["y"]["mean"]) for p in points] for side in ("low", "high")]
        axes.errorbar(x, y, yerr=errors, color=colour, linestyle="none", alpha=0.35)
        for point in points:
            if point["strength"]:
                axes.annotate(
                    f"{point['strength']:g}", (point["x"]["mean"], point["y"]["mean"]),
                    textcoords="offset points", xytext=(4, 4), fontsize=7, color=colour,
                )  # fmt: skip
    aligned = table["none"]["none"]["complied"]["mean"]
    axes.axhline(aligned, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        "aligned model alone",
        (0.5, aligned),
        textcoords="offset points",
        xytext=(0, -3),
        fontsize=7,
        va="top",
    )
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.05), ylabel="ASR (less is safer)", title=title)
    whose = "its own" if own else "of the benign adapter, so treated"
    axes.set_xlabel(f"utility, {whose} (mean of exact JSON and Rouge-1)")
    axes.legend(fontsize=7, loc="upper left")
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _points(rows: dict[str, Any], useful: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """From the adapter as uploaded to the method's greatest strength."""
    names = ["raw-0", *sorted((n for n in rows if n.rpartition("-")[0] == method), key=_strength)]
    return [
        {"x": useful[name]["utility"], "y": rows[name]["complied"], "strength": _strength(name)}
        for name in names
        if "utility" in useful.get(name, {})
    ]


def _strength(name: str) -> float:
    return float(name.rpartition("-")[2])
