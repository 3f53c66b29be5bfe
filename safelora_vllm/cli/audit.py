"""``safelora-vllm audit``: what the audit log of an adapter store says, as a table or as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safelora_vllm.cli.audit_table import Judged, print_records
from safelora_vllm.cli.options import STORE
from safelora_vllm.durations import parse_since
from safelora_vllm.errors import UsageError
from safelora_vllm.store.audit_log import ACTIONS, AuditLog
from safelora_vllm.store.layout import AUDIT, default_root

_FILTERS = ("adapter", "actor", "action")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser("audit", allow_abbrev=False, help="show who did what to which adapter")
    parser.add_argument("--adapter-store", metavar="DIR", help=STORE)
    parser.add_argument("--since", metavar="TIME", help="from then on: 90s, 15m, 2h, 7d (ago) or 2026-01-31")
    parser.add_argument("--until", metavar="TIME", help="before then, written like --since")
    parser.add_argument("--adapter", metavar="NAME", help="only this adapter")
    parser.add_argument(
        "--actor", metavar="ID", help="only this key, e.g. admin/alice or acme/ci; or server or operator"
    )
    parser.add_argument(
        "--action", choices=ACTIONS, metavar="ACTION", help=f"only {', '.join(ACTIONS[:-1])} or {ACTIONS[-1]}"
    )
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
        shown = _print_json(record for record, _ in wanted) if args.json else print_records(wanted)
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
