"""``safelora-vllm store``: what the adapter store holds, and keeping it small and sound."""

from __future__ import annotations

import argparse
import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_vllm.cli import DONE, PROBLEMS, preview
from safelora_vllm.cli.options import STORE, UNITS, size
from safelora_vllm.errors import UsageError

if TYPE_CHECKING:
    from safelora_vllm.store import AdapterRecord
    from safelora_vllm.store.housekeeping import Collected
    from safelora_vllm.store.serving import State

_DIGEST = re.compile(r"[0-9a-f]{8,64}")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """``store`` with its own commands: ls, gc, verify, rm, preview."""
    store = commands.add_parser("store", allow_abbrev=False, help="list, check or shrink the adapter store")
    actions = store.add_subparsers(dest="action", required=True, metavar="ACTION")

    ls = actions.add_parser(
        "ls", allow_abbrev=False, help="list the names, whether they are served, and why not"
    )
    how = ls.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print all records, old versions too, as JSON")
    how.add_argument(
        "--digest",
        metavar="D",
        help="print only the names and versions with this content, one a line; its first 8 digits will do",
    )
    ls.set_defaults(run=_ls)

    gc = actions.add_parser(
        "gc",
        allow_abbrev=False,
        help="remove what interrupted work left, and what the options name",
    )
    gc.add_argument(
        "--max-bytes",
        type=size,
        metavar="N",
        help="remove published copies, least recently used first, down to N, e.g. 10GB or 500MB; only "
        "those that no name serves and that can be made again",
    )
    gc.add_argument(
        "--unreferenced", action="store_true", help="remove uploads that no version of a name refers to"
    )
    gc.set_defaults(run=_gc)

    verify = actions.add_parser(
        "verify", allow_abbrev=False, help="read the whole store; exit code 1 if anything is damaged"
    )
    verify.set_defaults(run=_verify)

    rm = actions.add_parser("rm", allow_abbrev=False, help="remove a name with all its versions")
    rm.add_argument(
        "name", help="of the adapter; a server's gate deletes its upload, or 'gc --unreferenced' does"
    )
    rm.set_defaults(run=_rm)

    before = preview.add_parser(actions)
    before.set_defaults(run=lambda args: preview.run(args, _root(args)))

    for action in (ls, gc, verify, rm, before):
        action.add_argument("--adapter-store", metavar="DIR", help=STORE)


def _root(args: argparse.Namespace) -> Path:
    """The store's folder, which exists; one without anything in it is a store that nothing was put in yet."""
    from safelora_vllm.store.layout import FOLDERS, default_root

    root = Path(args.adapter_store) if args.adapter_store else default_root()
    found = {item.name for item in root.iterdir()} if root.is_dir() else None
    if found is None or (found and found.isdisjoint(FOLDERS)):
        raise UsageError(f"{root} is not an adapter store: expected the server's --adapter-store")
    return root


def _ls(args: argparse.Namespace) -> int:
    from safelora_vllm.store import NameStore
    from safelora_vllm.store.name_record import to_dict

    found = _with_state(sorted(NameStore(root := _root(args)).all().items()), root)
    if args.digest is not None:
        _print_versions(args.digest, [record for record, _ in found])
    elif args.json:
        print(
            json.dumps([{**to_dict(record), "state": state._asdict()} for record, state in found], indent=1)
        )
    else:
        _print_table(found)
    return 0


def _print_versions(digest: str, records: list[AdapterRecord]) -> None:
    """Those with a content."""
    if not _DIGEST.fullmatch(digest):
        raise UsageError(f"--digest {digest!r:.80}: expected 8 to 64 of the digits 0-9 and a-f")
    versions = [
        (of, version) for of in records for version in of.versions if version.digest.startswith(digest)
    ]
    for of, version in versions:
        live = "current" if version == of.live else "old"
        print(f"{_printable(of.name)} version {version.version} {live} {version.digest}")
    if not versions:
        print(f"no name has a version with the content {digest}", file=sys.stderr)


def _with_state(records: list[tuple[str, AdapterRecord]], root: Path) -> list[tuple[AdapterRecord, State]]:
    """Each record, and what a server last said of whether it is served."""
    from safelora_vllm.store.serving import load, unknown_state

    serving = load(root)
    return [(record, serving.state(record) if serving else unknown_state(record)) for _, record in records]


def _print_table(records: list[tuple[AdapterRecord, State]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from safelora_vllm.cli.tables import terminal

    table = Table()
    for column in ("name", "state", "version", "digest", "size", "rank", "created", "by", "policy"):
        right = column in ("version", "size", "rank")
        table.add_column(column, overflow="fold", justify="right" if right else "left")
    for record, state in records:
        live = record.live
        policy = [f"{field}={value}" for field, value in live.policy.items()]
        cells = (
            record.name,
            f"{state.word}: {state.why}" if state.why else state.word,
            str(live.version),
            live.digest[:12],
            _in_words(live.bytes),
            str(live.rank),
            f"{datetime.fromtimestamp(live.created, UTC):%Y-%m-%d %H:%MZ}",
            live.by,
            " ".join(["OVERRIDE"] * live.override + policy),
        )
        table.add_row(*(Text(_printable(cell)) for cell in cells))
    terminal().print(table)


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)


def _gc(args: argparse.Namespace) -> int:
    from safelora_vllm.store import housekeeping
    from safelora_vllm.store.verdict_pruning import prune_verdicts

    root = _root(args)
    housekeeping.clean(root)
    prune_verdicts(root)
    if not args.unreferenced and args.max_bytes is None:
        print("What interrupted work left was removed. --unreferenced and --max-bytes remove more")
    if args.unreferenced:
        _print_collected(housekeeping.collect_unreferenced(root), "uploads")
    if args.max_bytes is not None:
        _print_collected(housekeeping.collect(root, args.max_bytes), "published copies")
    return 0


def _print_collected(collected: Collected, what: str) -> None:
    print(
        f"{what}: removed {len(collected.removed)} folders of {_in_words(collected.freed)}, "
        f"{_in_words(collected.left)} are left"
    )


def _verify(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from safelora_vllm.store import NameStore, RawStore
    from safelora_vllm.store.housekeeping import verify

    root = _root(args)
    problems = verify(root, lambda checks: tqdm(checks, desc="Adapter store", unit="folder"))
    for problem in problems:
        print(problem)
    found = _with_state(sorted(NameStore(root).all().items()), root)
    refused = sum(state.word == "refused" for _, state in found)
    counts = f"{len(found)} names, {len(RawStore(root).all())} uploads"
    if refused:
        counts += f"; {refused} of the names refused by the rules of the server: 'store ls' says why"
    print(f"{len(problems)} problems" if problems else f"the adapter store is sound: {counts}")
    return PROBLEMS if problems else DONE


def _rm(args: argparse.Namespace) -> int:
    from safelora_vllm.store.audit_log import OPERATOR, AuditLog
    from safelora_vllm.store.layout import AUDIT
    from safelora_vllm.store.mirror import open_names
    from safelora_vllm.store.recorded import Line, RecordedNames

    names = open_names(root := _root(args))
    record = names.get(args.name)
    if record is None:
        raise UsageError(f"there is no adapter {args.name!r} in {names.root}; 'store ls' lists them")
    removed = {"decision": "removed", "version": record.live.version}
    line = Line(OPERATOR, "delete", lambda _: removed)
    RecordedNames(names, AuditLog(root / AUDIT)).update(args.name, lambda _: None, line)
    versions = f"{len(record.versions)} version{'s' * (len(record.versions) != 1)}"
    freed = "a server's gate deletes its upload within 35 minutes, or 'gc --unreferenced' does"
    print(f"{args.name} with {versions} removed; {freed}")
    return 0


def _in_words(nbytes: int) -> str:
    """A size as people write it, e.g. 12.3 MB."""
    for unit in ("TB", "GB", "MB", "KB"):
        if nbytes >= UNITS[unit]:
            return f"{nbytes / UNITS[unit]:.1f} {unit}"
    return f"{nbytes} B"
