"""``safelora-vllm audit``: what the audit log of an adapter store says, as a table or as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safelora_vllm.cli.options import STORE
from safelora_vllm.errors import PolicyError, UsageError
from safelora_vllm.policy import CAPS, Policy
from safelora_vllm.store.audit_log import AuditLog, parse_since
from safelora_vllm.store.layout import AUDIT, default_root

Judged = tuple[dict[str, Any], dict[str, Any]]  # a record and the policy before it
_FILTERS = ("adapter", "actor", "action")
_UNPROJECTED = ("report-only", "audit")  # the mode and its former name


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser("audit", allow_abbrev=False, help="show who did what to which adapter")
    parser.add_argument("--adapter-store", metavar="DIR", help=STORE)
    parser.add_argument("--since", metavar="TIME", help="from then on: 90s, 15m, 2h, 7d (ago) or 2026-01-31")
    parser.add_argument("--until", metavar="TIME", help="before then, written like --since")
    parser.add_argument("--adapter", metavar="NAME", help="only this adapter")
    parser.add_argument("--actor", metavar="ID", help="only this key, e.g. admin/alice or acme/ci")
    parser.add_argument("--action", help="only upload, load, rollback, policy, delete or unload")
    parser.add_argument("--json", action="store_true", help="print the records as JSON lines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the records that are asked for. Exit code 0, also when there are none."""
    since, until = (parse_since(text) if text is not None else None for text in (args.since, args.until))
    folder = _folder(args.adapter_store)
    filters = {name: value for name in _FILTERS if (value := getattr(args, name)) is not None}
    try:
        if not folder.is_dir():
            raise UsageError(
                f"there is no audit log {folder}: expected it in the server's --adapter-store. The log "
                "begins when the first adapter is loaded"
            )
        records = _with_policy_before(AuditLog(folder).read(since, until))
        wanted = (r for r in records if all(r[0].get(name) == value for name, value in filters.items()))
        shown = _print_json(record for record, _ in wanted) if args.json else _print_table(wanted)
    except PermissionError as error:
        raise UsageError(f"{error.filename} cannot be read; run this as the server's user") from error
    if not shown:
        print(f"no matching record in {folder}", file=sys.stderr)
    return 0


def _folder(store: str | None) -> Path:
    return (Path(store) if store else default_root()) / AUDIT


def _print_json(records: Iterable[dict[str, Any]]) -> int:
    shown = 0
    for record in records:
        print(json.dumps(record))
        shown += 1
    return shown


def _with_policy_before(records: Iterable[dict[str, Any]]) -> Iterator[Judged]:
    """Each record, and the policy by which its adapter was last accepted; empty where nothing says it."""
    last: dict[str, dict[str, Any]] = {}
    for record in records:
        name, policy = record.get("adapter"), record.get("policy")
        yield record, last.get(str(name), {})
        if record.get("decision") == "accepted" and isinstance(policy, dict):
            last[str(name)] = policy


def _print_table(records: Iterable[Judged]) -> int:
    from rich.table import Table
    from rich.text import Text

    from safelora_vllm.cli.tables import terminal

    columns = ("time", "actor", "action", "adapter", "version", "digest", "policy", "decision", "reasons")
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for record, before in records:
        cells = _in_short({**dict.fromkeys(columns), **record}, before, columns)
        table.add_row(*(Text(_cell(value)) for value in cells))
    if table.row_count:
        terminal().print(table)
    return table.row_count


def _in_short(record: dict[str, Any], before: dict[str, Any], columns: Iterable[str]) -> list[Any]:
    """The columns of a record; of the policy what sets it apart, and whether it was an override."""
    policy = record["policy"] if isinstance(record["policy"], dict) else {}
    told = [str(policy[field]) for field in ("method", "select") if field in policy]
    told += _figures(policy, before)
    told += ["UNPROJECTED"] * (policy.get("mode") in _UNPROJECTED) + ["OVERRIDE"] * bool(
        record.get("override")
    )
    short = {**record, "policy": " ".join(told), "digest": str(record["digest"] or "")[:12]}
    return [short[column] for column in columns]


def _figures(policy: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """The policy's figures: those that its method and selection read, and caps other than the default.

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
        shown = changed or (field in full.chosen if field in CAPS else full.has_effect(field))
        if value is not None and shown:
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
