"""Records of the audit log for people: a table, or on a narrow terminal some lines for each record."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from safelora_vllm.errors import PolicyError
from safelora_vllm.policy import CAPS, NOTHING, Policy

if TYPE_CHECKING:
    from rich.console import Console

Judged = tuple[dict[str, Any], dict[str, Any]]  # a record and the policy before it
COLUMNS = ("time", "actor", "action", "adapter", "version", "digest", "policy", "decision", "reasons")
_WHOLE = ("time", "action", "version", "digest")  # short, and unreadable in parts
_WIDE = 120  # columns of a terminal on which the table is readable
_UNPROJECTED = ("report-only", "audit")  # the mode and its former name
_INDENT = "    "


def print_records(records: Iterable[Judged]) -> int:
    """Print them as the terminal is wide. Returns how many there were."""
    from safelora_vllm.cli.tables import terminal

    console = terminal()
    return _print_table(records, console) if console.width >= _WIDE else _print_lines(records, console)


def _print_table(records: Iterable[Judged], console: Console) -> int:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=column in _WHOLE)
    for record, before in records:
        shown = {"time": _time(record), "policy": _policy(record, before), "decision": _decision(record)}
        cells = {**record, **shown, "digest": str(record.get("digest") or "")[:12]}
        table.add_row(*(Text(_cell(cells.get(column))) for column in COLUMNS))
    if table.row_count:
        console.print(table)
    return table.row_count


def _print_lines(records: Iterable[Judged], console: Console) -> int:
    """What happened in the first line of each record, how it was judged in those below."""
    count = 0
    for record, before in records:
        count += 1
        number = f" version {record['version']}" if record.get("version") else ""
        what = " ".join(filter(None, (_cell(record.get("action")), _decision(record))))
        adapter, actor = _cell(record.get("adapter")), _cell(record.get("actor"))
        told = [f"{_time(record)}  {what}: {adapter}{number}, by {actor}"]
        told += [_INDENT + text for text in _below(record, before)]
        for line in told:
            wrapped = textwrap.wrap(
                line, console.width, subsequent_indent=2 * _INDENT, break_on_hyphens=False
            )
            console.print("\n".join(wrapped), markup=False, highlight=False, soft_wrap=True)
    return count


def _time(record: dict[str, Any]) -> str:
    """To the second."""
    return _cell(str(record.get("time"))[:19].replace("T", " ") + "Z")


def _decision(record: dict[str, Any]) -> str:
    """In a word, and how often where the record stands for several calls."""
    count = record.get("count")
    return _cell(record.get("decision")) + (f" ×{_cell(count)}" if count else "")


def _below(record: dict[str, Any], before: dict[str, Any]) -> list[str]:
    found = [("refused for", _cell(record.get("reasons"))), ("policy", _policy(record, before))]
    found.append(("digest", _cell(str(record.get("digest") or "")[:12])))
    return [f"{name}: {text}" for name, text in found if text]


def _policy(record: dict[str, Any], before: dict[str, Any]) -> str:
    """All of a record's policy that matters, and whether an operator allowed it though it is less strict."""
    policy = record["policy"] if isinstance(record.get("policy"), dict) else {}
    projects = [_cell(policy[field]) for field in ("method", "select") if field in policy]
    told = [NOTHING] if policy.get("select") == "none" else projects
    told += _figures(policy, before)
    told += ["UNPROJECTED"] * (policy.get("mode") in _UNPROJECTED)
    told += ["second opinion"] * bool(policy.get("opinion"))
    reason = _cell(record.get("reason") or "")
    if record.get("override"):
        told.append(f"OVERRIDE ({reason})" if reason else "OVERRIDE")
    elif reason:
        told.append(f"({reason})")
    return " ".join(told)


def _figures(policy: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """The policy's figures: those that its method and selection read, and both caps.

    One that has changed since the adapter was last accepted has its former value before an arrow.
    """
    try:
        full = Policy.from_stored(policy)
    except PolicyError:  # of a newer release
        return []
    figures = []
    for field in ("energy", "threshold", "number", *CAPS):
        value, former = policy.get(field), before.get(field)
        changed = former is not None and former != value
        if value is not None and (changed or full.has_effect(field)):
            figures.append(f"{field}={f'{former:g}→' if changed else ''}{value:g}")
    return figures


def _cell(value: Any) -> str:
    """A value as text that cannot steer the terminal: names come from whoever called."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    text = value if isinstance(value, str) else json.dumps(value)
    return text if text.isprintable() else repr(text)
