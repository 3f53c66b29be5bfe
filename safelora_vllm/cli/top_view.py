"""What ``safelora-vllm top`` shows, fitted into the terminal as it is now."""

from __future__ import annotations

import time
from collections import Counter
from datetime import datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from safelora_vllm.cli.tables import printable, terminal

_STYLES = {"served": "green", "refused": "red", "unavailable": "yellow"}
_ORDER = {"refused": 0, "unavailable": 1, "served": 2}
_PLAIN: dict[str, Any] = {
    "expand": True,
    "pad_edge": False,
    "box": SIMPLE_HEAD,
    "show_edge": False,
    "padding": (0, 1, 0, 0),
}
# Columns of the terminal below which there are fewer, and from which on more.
_NARROW, _WIDE, _WIDEST = 70, 110, 150
_LEAST_ROWS, _REFUSALS, _HEAD = 3, 5, 2
_UNPROJECTED, _BY_OPINION, _BY_EXAM = "UNPROJECTED", "by opinion", "by exam"
# In the line of counts, of adapters that are served as they were uploaded.
_TOLD = {
    _UNPROJECTED: "UNPROJECTED",
    _BY_OPINION: "as uploaded, with a second opinion",
    _BY_EXAM: "as uploaded, since they passed the exam",
}
_STATE_WIDTH = len("as uploaded, opinion…")


class Frame:
    """The latest answer of a server. trouble: why there is no newer one."""

    def __init__(self, url: str, answer: dict[str, Any], console: Console | None = None) -> None:
        self.url, self.trouble = url, ""
        self._console = console or terminal()
        self.show(answer)

    def show(self, answer: dict[str, Any]) -> None:
        """Take a newer answer."""
        self._answer, self._at, self.trouble = answer, time.time(), ""

    def live(self) -> Live:
        """The view on the whole terminal; it follows the terminal's size."""
        return Live(console=self._console, screen=True, refresh_per_second=2, get_renderable=self.rendered)

    def print_once(self) -> None:
        """All adapters, below each other."""
        self._console.print(self._group(None))

    def rendered(self) -> RenderableType:
        """As much as the terminal has room for."""
        return self._group(self._console.height)

    def _group(self, height: int | None) -> Group:
        adapters = sorted(
            self._answer["adapters"],
            key=lambda a: (_ORDER.get(a["state"], 0), -(a["created"] or 0), a["name"]),
        )
        refusals = self._answer.get("refusals", [])
        parts: list[RenderableType] = [self._head(), self._counts(adapters)]
        if self.trouble:
            parts.append(_line(self.trouble, "bold red"))
        shown, kept = adapters, refusals[:_REFUSALS]
        if height is not None:
            if height < 18:
                kept = []
            used = len(parts) + _HEAD + 1 + (len(kept) + _HEAD + 2 if kept else 0)
            shown = adapters[: max(_LEAST_ROWS, height - used)]
        parts.append(self._adapters(shown) if adapters else _line("No adapters yet.", "dim"))
        if len(shown) < len(adapters):
            parts.append(_line(f"and {len(adapters) - len(shown)} more; a taller terminal shows them", "dim"))
        if kept:
            parts += [Text(), _refusals(kept)]
        return Group(*parts)

    def _head(self) -> Text:
        caller = self._answer["caller"]
        who = f"tenant {caller['tenant']}" if caller["tenant"] else caller["key"]
        clock = time.strftime("%H:%M:%S", time.localtime(self._at))
        return _line(f"safelora  {printable(self.url)}  as {printable(who)}  at {clock}", "bold")

    def _counts(self, adapters: list[dict[str, Any]]) -> Text:
        counts = {state: sum(a["state"] == state for a in adapters) for state in _STYLES}
        told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        how = Counter(_how(a) for a in adapters)
        more = "".join(f"; {how[of]} {words}" for of, words in _TOLD.items() if how[of])
        return _line(f"{len(adapters)} adapters: {told or 'none'}{more}")

    def _adapters(self, adapters: list[dict[str, Any]]) -> Table:
        wide = self._console.width >= _WIDE
        table = Table(**_PLAIN)
        table.add_column("adapter", ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column("state", no_wrap=True, overflow="ellipsis", max_width=40 if wide else _STATE_WIDTH)
        names = ("version", "age", "projected", *(("least retained", "rank") if wide else ()), "norm")
        names = names[:2] if self._console.width < _NARROW else names
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        examined = self._console.width >= _NARROW and any(a.get("exam") for a in self._answer["adapters"])
        if examined:
            table.add_column("exam", no_wrap=True, overflow="ellipsis")
        for a in adapters:
            figures = a["figures"] or {}
            retained = figures.get("least_retained")
            more = ["–" if retained is None else f"{retained:.3f}", str(a["rank"] or "–")] if wide else []
            cells = [
                str(a["version"] or "fixed"),
                _ago(a["created"]),
                _projected(a, figures),
                *more,
                f"{figures['total_norm']:.4f}" if figures else "–",
            ]
            exam = [_exam(a, self._console.width)] if examined else []
            table.add_row(Text(printable(a["name"])), _state(a), *map(Text, cells[: len(names)] + exam))
        return table


def _projected(adapter: dict[str, Any], figures: dict[str, Any]) -> str:
    if not figures:
        return "–"
    return f"{figures['projected'] if adapter['mode'] == 'enforce' else 0}/{figures['modules']}"


def _exam(adapter: dict[str, Any], width: int) -> str:
    """The verdict, and as fits the score and the rung."""
    if not (found := adapter.get("exam")):
        return "–"
    passed = "by opinion" if found.get("by_opinion") else "passed"
    words = [passed if found["passed"] else "failed"]
    if width >= _WIDE and found["bound"] is not None:
        words.append(f"{found['bound']:.4f}")
    if width >= _WIDEST and found["rung"]:
        words.append(found["rung"])
    return printable(" ".join(words))


def _how(adapter: dict[str, Any]) -> str:
    """What it is that serves it as it was uploaded; empty where nothing does."""
    if adapter["mode"] not in (None, "enforce"):
        return _UNPROJECTED
    if adapter.get("method") != "none":
        return ""
    if adapter.get("second_opinion"):
        return _BY_OPINION
    return _BY_EXAM if (adapter.get("exam") or {}).get("enforced") else _UNPROJECTED


def _state(adapter: dict[str, Any]) -> Text:
    codes = ", ".join(dict.fromkeys(reason["code"] for reason in adapter["reasons"]))
    words = adapter["state"] + (f": {codes}" if codes else "")
    if how := _how(adapter):  # it is served, then
        words = _UNPROJECTED if how == _UNPROJECTED else "as uploaded"
    if adapter.get("second_opinion"):
        words += ", opinion"
    if adapter["override"]:
        words += ", override"
    return Text(printable(words), style=_STYLES.get(adapter["state"], ""))


def _refusals(records: list[dict[str, Any]]) -> Table:
    table = Table(title="Newest refusals", title_justify="left", **_PLAIN)
    table.add_column("age", justify="right", no_wrap=True)
    table.add_column("adapter", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("action", no_wrap=True)
    table.add_column("reasons", ratio=1, no_wrap=True, overflow="ellipsis")
    for record in records:
        when = _ago(datetime.fromisoformat(record["time"]).timestamp())
        cells = (record["adapter"], record["action"], ", ".join(record["reasons"]))
        table.add_row(when, *(Text(printable(cell)) for cell in cells))
    return table


def _ago(created: float | None) -> str:
    if created is None:
        return "–"
    seconds = max(0.0, time.time() - created)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return "now"


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
