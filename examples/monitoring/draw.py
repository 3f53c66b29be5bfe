"""Draw the dashboard's panels as pictures, from the data of a running Prometheus: without Grafana.

    python examples/monitoring/draw.py --prometheus http://127.0.0.1:9090 --adapter acme/orders \\
        --tenant acme --minutes 15 --out docs

Writes one picture for each row of the dashboard. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.dates import MINUTELY, AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

HERE = Path(__file__).parent
DASHBOARD = HERE / "grafana" / "dashboards" / "safelora.json"
NAMES = ("overview", "adapter", "tenant", "gate")  # of the rows, in their order
WIDTH, ROW_HEIGHT = 12.5, 0.36  # inches: of a picture, and of one unit of Grafana's grid
POINTS = 240
GREY, PALE = "#5f6368", "#e3e6ea"


@dataclass(frozen=True)
class Source:
    """A Prometheus, the time that is shown, and the variables of the dashboard."""

    url: str
    seconds: float
    until: float
    variables: dict[str, str]

    def now(self, query: str) -> list[dict[str, Any]]:
        return self._ask("query", query=query, time=self.until)

    def over_time(self, query: str) -> list[dict[str, Any]]:
        step = max(self.seconds / POINTS, 1.0)
        return self._ask(
            "query_range", query=query, start=self.until - self.seconds, end=self.until, step=step
        )

    def _ask(self, kind: str, query: str, **more: float) -> list[dict[str, Any]]:
        fields = urllib.parse.urlencode({"query": self.filled(query), **more})
        with urllib.request.urlopen(f"{self.url}/api/v1/{kind}?{fields}", timeout=60) as answer:
            return list(json.load(answer)["data"]["result"])

    def filled(self, text: str) -> str:
        """With the dashboard's variables in their places."""
        for name, value in self.variables.items():
            text = text.replace(f"${name}", value)
        return text


def main() -> None:
    """Draw all rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its URL")
    parser.add_argument("--adapter", required=True, help="of the row about one adapter")
    parser.add_argument("--tenant", required=True, help="of the row about one tenant")
    parser.add_argument("--minutes", type=float, default=60.0, help="that are shown")
    parser.add_argument(
        "--until", type=float, default=time.time(), help="Unix time of their end (default: now)"
    )
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the pictures")
    args = parser.parse_args()
    variables = {"adapter": args.adapter, "tenant": args.tenant}
    source = Source(args.prometheus, 60 * args.minutes, args.until, variables)
    for name, (title, panels) in zip(NAMES, rows(json.loads(DASHBOARD.read_text())), strict=True):
        path = args.out / f"monitoring-{name}.png"
        draw(source, source.filled(title), panels, path)
        print(f"{path}: {path.stat().st_size:,} bytes")


def rows(dashboard: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Title and panels of each row."""
    panels = dashboard["panels"]
    starts = [at for at, panel in enumerate(panels) if panel["type"] == "row"]
    for start, end in zip(starts, [*starts[1:], len(panels)], strict=True):
        yield panels[start]["title"], panels[start + 1 : end]


def draw(source: Source, title: str, panels: list[dict[str, Any]], path: Path) -> None:
    """One row, with its panels where Grafana has them."""
    pyplot.rcParams |= {"font.size": 8.5, "axes.titlesize": 9.5, "font.family": "DejaVu Sans"}
    top = min(panel["gridPos"]["y"] for panel in panels)
    high = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) - top
    inches = high * ROW_HEIGHT + 0.45
    figure = pyplot.figure(figsize=(WIDTH, inches))
    figure.text(0.012, 1 - 0.16 / inches, title, fontsize=12, weight="bold", va="top")
    for panel in panels:
        place = panel["gridPos"]
        left, width = place["x"] / 24, place["w"] / 24
        height = place["h"] * ROW_HEIGHT
        bottom = inches - 0.45 - (place["y"] - top) * ROW_HEIGHT - height
        KINDS[panel["type"]](figure, (left, bottom / inches, width, height / inches), source, panel)
    figure.savefig(path, dpi=100, facecolor="white", pil_kwargs={"optimize": True})
    pyplot.close(figure)


def _card(figure: Any, box: tuple[float, float, float, float], title: str) -> Axes:
    """The frame of a panel, with its title; its coordinates are inches from its lower left corner."""
    wide, high = figure.get_size_inches()
    left, bottom, width, height = box
    card = figure.add_axes((left + 0.004, bottom + 0.05 / high, width - 0.008, height - 0.1 / high))
    card.set(xlim=(0, width * wide), ylim=(0, height * high), xticks=[], yticks=[])
    for spine in card.spines.values():
        spine.set_color(PALE)
    card.text(0.1, height * high - 0.1, title, fontsize=8.5, color="#202124", va="top", weight="bold")
    return card


def stat(figure: Any, box: tuple[float, float, float, float], source: Source, panel: dict[str, Any]) -> None:
    """Large numbers."""
    card = _card(figure, box, panel["title"])
    found = [
        (legend(target, series), float(series["value"][1]))
        for target in panel["targets"]
        for series in source.now(target["expr"])
    ]
    wide, high = card.get_xlim()[1], card.get_ylim()[1]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    for at, (name, value) in enumerate(found):
        middle = wide * (at + 0.5) / len(found)
        worded = len(found) == 1 and len(name) > 12  # what matters is in its labels
        text = name.replace(" on ", "\non ") if worded else shown(unit, value)
        card.text(
            middle,
            high * 0.47,
            text,
            fontsize=11 if worded else 20,
            color="#137333",
            ha="center",
            va="center",
        )
        if len(found) > 1:
            card.text(middle, high * 0.14, name, fontsize=8.5, color=GREY, ha="center", va="center")


def table(figure: Any, box: tuple[float, float, float, float], source: Source, panel: dict[str, Any]) -> None:
    """Labels and values, as many as there is room for; with one row, one below the other."""
    card = _card(figure, box, panel["title"])
    unit = panel["fieldConfig"]["defaults"]["unit"]
    found = source.now(panel["targets"][0]["expr"])
    if len(found) == 1 and len(found[0]["metric"]) > 1:
        lines = [(name, cut(value, 28)) for name, value in sorted(found[0]["metric"].items())]
    else:
        lines = [(cut(legend(panel["targets"][0], s), 38), shown(unit, float(s["value"][1]))) for s in found]
    wide, high = card.get_xlim()[1], card.get_ylim()[1]
    room = int((high - 0.45) / 0.22)
    for at, (name, value) in enumerate(lines[:room]):
        y = high - 0.5 - at * 0.22
        card.text(0.12, y, name, va="center", color=GREY if len(found) == 1 else "#202124")
        card.text(wide - 0.12, y, value, va="center", ha="right")
        card.plot([0.1, wide - 0.1], [y - 0.11] * 2, color=PALE, linewidth=0.6)


def timeseries(
    figure: Any, box: tuple[float, float, float, float], source: Source, panel: dict[str, Any]
) -> None:
    """Lines over the time that is shown, with a second axis where an override asks for one."""
    defaults = panel["fieldConfig"]["defaults"]["unit"]
    card = _card(figure, box, panel["title"] + (" (req/s)" if defaults == "reqps" else ""))
    others = {each["matcher"]["options"]: _properties(each) for each in panel["fieldConfig"]["overrides"]}
    lines = [
        (legend(target, series), series["values"])
        for target in panel["targets"]
        for series in source.over_time(target["expr"])
    ]
    wide, high = figure.get_size_inches()
    left, bottom, width, height = box
    room = int((width * wide - 0.5) / 0.075)  # characters of a line
    columns = 2 if max([len(name) for name, _ in lines], default=0) + 5 <= room / 2 else 1
    named = min(math.ceil(len(lines) / columns), int((height * high - 1.3) / 0.2))  # in the legend
    below = 0.2 * named  # inches
    right = 0.5 if others else 0.2
    inner = (
        left + 0.68 / wide, bottom + (0.34 + below) / high, width - (0.68 + right) / wide,
        height - (0.34 + below + 0.45) / high,
    )  # fmt: skip
    axes = figure.add_axes(inner)
    second = axes.twinx() if others else None
    for at, (name, values) in enumerate(lines):
        times = date2num([datetime.fromtimestamp(moment, UTC) for moment, _ in values])
        heights = [float(value) for _, value in values]
        on = second if second is not None and name in others else axes
        style = "--" if on is second else "-"
        on.plot(times, heights, style, color=f"C{at}", linewidth=1.6, label=name)
    _dress(axes, defaults)
    begin, end = (datetime.fromtimestamp(t, UTC) for t in (source.until - source.seconds, source.until))
    axes.set_xlim(date2num(begin), date2num(end))
    locator = AutoDateLocator(minticks=3, maxticks=max(3, int(inner[2] * wide / 0.55)))
    locator.intervald[MINUTELY] = [1, 2, 5, 10, 15, 30]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
    if second is not None:
        _dress(second, next(iter(others.values()))["unit"])
        second.yaxis.grid(False)
    if lines:
        drawn = [line for on in filter(None, (axes, second)) for line in on.get_lines()][: named * columns]
        card.legend(
            handles=drawn, labels=[cut(str(line.get_label()), room // columns - 4) for line in drawn],
            ncols=columns, frameon=False, loc="lower left", fontsize=8, borderaxespad=0.5, handlelength=1.2,
            columnspacing=1.2, labelspacing=0.35, borderpad=0.1,
        )  # fmt: skip
    else:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color=GREY)


def _dress(axes: Axes, unit: str) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(side == "bottom")
        axes.spines[side].set_color("#9aa0a6")
    axes.yaxis.grid(True, color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    values = [value for line in axes.get_lines() for value in line.get_ydata() if not math.isnan(value)]
    low, high = min([0.0, *values]), max([0.0, *values])
    high = high if high > low else 1.0
    axes.set_ylim(low - 0.02 * (high - low), high + 0.08 * (high - low))
    scale = 1024.0 ** int(math.log(high, 1024)) if unit == "bytes" and high >= 1024 else 1.0
    whole = unit == "none" and all(value == int(value) for value in values)
    ticks = MaxNLocator(4, integer=whole).tick_values(low / scale, high / scale) * scale
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high * 1.08]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(unit, value)))
    axes.tick_params(colors=GREY, length=0, labelsize=8)


def _properties(override: dict[str, Any]) -> dict[str, Any]:
    return {each["id"]: each["value"] for each in override["properties"]}


def legend(target: dict[str, Any], series: dict[str, Any]) -> str:
    """The name of a series, as the target's legend has it."""
    pattern: str = target["legendFormat"]
    return re.sub(r"\{\{(\w+)\}\}", lambda found: series["metric"].get(found[1], ""), pattern)


def cut(text: str, length: int) -> str:
    """With at most so many characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def shown(unit: str, value: float) -> str:
    """A number with its unit, as Grafana writes it."""
    if math.isnan(value):
        return "–"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "bytes":
        power = 0
        while abs(value) >= 1024 and power < 4:
            value, power = value / 1024, power + 1
        return f"{value:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if abs(value) < 1 else f"{value:.3g} s"
    return f"{value:.3g}"


KINDS: dict[str, Callable[..., None]] = {"stat": stat, "table": table, "timeseries": timeseries}

if __name__ == "__main__":
    main()
