"""Pictures: what each method's strength buys, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dominance
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from treatments import RAW, input_removal

from safelora_vllm.policy import Policy

BENIGN = "benign-qv"
# Label, colour, marker, and where from its marker a strength is written.
_STYLES = {
    "safe-lora": ("Safe LoRA, share of modules", "tab:blue", "o", (6, 4, "left")),
    "input-removal": ("input removal, energy", "tab:red", "s", (5, -11, "left")),
    "early-values": ("early values, energy", "tab:purple", "^", (6, 4, "left")),
    "csulora": ("CSULoRA, energy", "tab:green", "D", (-6, 5, "right")),
    "scaling": ("scaling, by how much less", "tab:gray", "v", (5, -11, "left")),
    "random-removal": ("random removal, as many directions", "tab:brown", "x", (6, 4, "left")),
}
_APART = 0.045  # of a label from all others: where points crowd, only the first is labelled


def draw(table: dict[str, Any], adapter: str, title: str, path: Path) -> None:
    """ASR over utility: of the adapter itself, or where it has none, of the benign adapter so treated."""
    own = "utility" in table[adapter]["raw-0"]
    useful = table[adapter] if own else table.get(BENIGN, {})
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=110)
    labelled: list[tuple[float, float]] = []
    for method, (label, colour, marker, (right, up, side)) in _STYLES.items():
        points = _points(table[adapter], useful, method)
        if len(points) < 2:
            continue
        x, y = [p["x"]["mean"] for p in points], [p["y"]["mean"] for p in points]
        axes.plot(x, y, color=colour, marker=marker, label=label, linewidth=1.2, markersize=5)
        errors = [[abs(p["y"][end] - p["y"]["mean"]) for p in points] for end in ("low", "high")]
        axes.errorbar(x, y, yerr=errors, color=colour, linestyle="none", alpha=0.35)
        for point in points[1:]:
            at = point["x"]["mean"] + right / 250, point["y"]["mean"] + up / 150
            if all(abs(at[0] - x) > _APART or abs(at[1] - y) > _APART for x, y in labelled):
                labelled.append(at)
                axes.annotate(
                    f"{point['strength']:g}", (point["x"]["mean"], point["y"]["mean"]), ha=side,
                    textcoords="offset points", xytext=(right, up), fontsize=7, color=colour,
                )  # fmt: skip
    _single_points(axes, table[adapter], useful)
    aligned = table["none"]["none"]["complied"]["mean"]
    axes.axhline(aligned, color="black", linewidth=0.8, linestyle=":")
    low = {"textcoords": "offset points", "fontsize": 7, "va": "top"}
    axes.annotate("aligned model alone", (0.5, aligned), xytext=(0, -3), **low)
    if alone := table["none"]["none"].get("utility"):
        axes.axvline(alone["mean"], color="black", linewidth=0.8, linestyle=":")
        axes.annotate("aligned model alone", (alone["mean"], 0.0), xytext=(3, 8), **low)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.05), ylabel="ASR (less is safer)")
    axes.set_title(title, fontsize=10)
    whose = "its own" if own else "of the benign adapter, so treated"
    axes.set_xlabel(f"utility, {whose} (mean of exact JSON and Rouge-1)")
    axes.legend(fontsize=7, loc="upper left")
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _single_points(axes: Axes, rows: dict[str, Any], useful: dict[str, Any]) -> None:
    """Where the adapter is as uploaded, by the default, and with a second opinion."""
    opinion = next((name for name in rows if name.startswith("opinion-")), "")
    for name, said, style in (
        (RAW.name, "", {}),
        (
            input_removal(Policy().energy).name,
            "the default",
            {"color": "tab:red", "marker": "o", "markersize": 12},
        ),
        (opinion, "a second opinion", {"color": "black", "marker": "*", "markersize": 12}),
    ):
        if "utility" not in useful.get(name, {}) or name not in rows:
            continue
        at = useful[name]["utility"]["mean"], rows[name]["complied"]["mean"]
        if style:
            axes.plot(*at, fillstyle="none", linestyle="none", label=said, **style)
        else:
            low = {"textcoords": "offset points", "fontsize": 7, "ha": "right", "xytext": (-7, -2)}
            axes.annotate("as uploaded", at, **low)


def _points(rows: dict[str, Any], useful: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """From the adapter as uploaded to the method's greatest strength."""
    names = dominance.curve(rows, method)
    return [
        {"x": useful[name]["utility"], "y": rows[name]["complied"], "strength": dominance.strength(name)}
        for name in names
        if "utility" in useful.get(name, {})
    ]
