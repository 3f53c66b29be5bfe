"""``safelora-vllm store preview``: which stored adapters another policy would change, and how."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_vllm.cli import DONE
from safelora_vllm.cli.options import add_gate_options, chosen_policy
from safelora_vllm.errors import AdapterRefused, UsageError, codes_of

if TYPE_CHECKING:
    from safelora_vllm.policy import Policy
    from safelora_vllm.report import Report
    from safelora_vllm.store import AdapterRecord
    from safelora_vllm.tenants.rules import TenantRules


@dataclass(frozen=True)
class Verdict:
    """What a name's live version gets by some rules, in the figures that are compared."""

    accepted: bool
    reasons: list[str]
    mode: str
    projected: int
    modules: int
    least_retained: float | None
    total_norm: float

    @classmethod
    def of(cls, report: Report) -> Verdict:
        return cls(
            accepted=report.accepted,
            reasons=codes_of(report.reasons),
            mode=report.policy.mode,
            projected=report.count("projected"),
            modules=len(report.modules),
            least_retained=min(report.values("retained"), default=None),
            total_norm=report.total_norm,
        )


@dataclass(frozen=True)
class Change:
    """A name before and after. before: None where nothing says it any more."""

    name: str
    version: int
    before: Verdict | None
    after: Verdict

    @property
    def changed(self) -> bool:
        """Whether the new rules give another answer. Norms of an upload do not depend on rules."""
        if self.before is None:
            return True
        if not (self.before.accepted or self.after.accepted):
            return self.before.reasons != self.after.reasons
        return _told(self.before) != _told(self.after)

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        before = vars(self.before) if self.before else None
        about = {"name": self.name, "version": self.version, "changed": self.changed}
        return {**about, "before": before, "after": vars(self.after)}


def add_parser(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add it to the actions of ``safelora-vllm store``."""
    parser = actions.add_parser(
        "preview", allow_abbrev=False, help="show which adapters another policy would change; write nothing"
    )
    add_gate_options(parser)
    parser.add_argument("--keys", metavar="FILE", help="keys file with the tenants' policies")
    parser.add_argument("--json", action="store_true", help="print every name as JSON, changed or not")
    return parser


def run(args: argparse.Namespace, root: Path) -> int:
    """Judge what every name of the store serves by the policy of the options."""
    policy = chosen_policy(args)
    from tqdm import tqdm

    from safelora_vllm.store import NameStore

    records = sorted(NameStore(root).all().items())
    work = tqdm([record for _, record in records], desc="Adapters", unit="adapter", disable=len(records) < 2)
    changes = list(_changes(args, root, policy, work))
    if args.json:
        print(json.dumps([change.to_dict() for change in changes], indent=1, allow_nan=False))
    else:
        _print_table([change for change in changes if change.changed])
        print(f"{sum(change.changed for change in changes)} of {len(changes)} names would change")
    return DONE


def _changes(
    args: argparse.Namespace, root: Path, policy: Policy, records: Iterable[AdapterRecord]
) -> Iterator[Change]:
    import torch

    from safelora_vllm.gate.admit import GateSettings
    from safelora_vllm.methods.reads import check_energy
    from safelora_vllm.policy import Policy
    from safelora_vllm.projectors.cache import ProjectorCache
    from safelora_vllm.store import PublishedStore, RawStore
    from safelora_vllm.tenants.rules import rules_of

    cache, published, raw = ProjectorCache(args.projectors), PublishedStore(root), RawStore(root)
    check_energy(policy, cache)
    tenant_rules = _tenant_rules(args.keys, policy, lambda policy: check_energy(policy, cache))
    for record in records:
        live = record.live
        found = rules_of(policy, tenant_rules(record.name), live.policy, live.override).policy
        judged_by = Policy.from_mapping(found) if found else policy
        settings = GateSettings(cache, judged_by, torch.device(args.device))
        report = published.report(live.key) if live.key else None
        before = Verdict.of(report) if report else None
        if live.refused:
            codes = codes_of(live.refused)
            before = Verdict(False, codes, "", 0, 0, None, 0.0)
        yield Change(record.name, live.version, before, _judge(raw.path(live.digest), record.name, settings))


def _judge(folder: Path, name: str, settings: Any) -> Verdict:
    """What the gate says of a stored upload."""
    from safelora_vllm.adapters.read import read_adapter
    from safelora_vllm.gate.admit import evaluate
    from safelora_vllm.report import Report

    if not folder.is_dir():
        raise UsageError(f"the upload of {name!r} is missing in the store: 'store verify' names what is")
    try:
        return Verdict.of(evaluate(read_adapter(folder, settings.limits), name, settings)[0])
    except AdapterRefused as error:
        return Verdict.of(Report.refused(name, "", settings.cache.id, settings.policy, error))


def _tenant_rules(
    keys: str | None, server: Policy, fits: Callable[[Policy], None]
) -> Callable[[str], TenantRules]:
    """The rules of the tenant that owns a name."""
    from safelora_vllm.tenants.keys import KeyRing

    def check(entry: str, rules: TenantRules) -> None:
        rules.check(entry, server, fits)

    return KeyRing.open(Path(keys) if keys else None, None, [], None, check).rules


def _print_table(changes: list[Change]) -> None:
    from rich.table import Table
    from rich.text import Text

    from safelora_vllm.cli.tables import terminal

    if not changes:
        return
    table = Table()
    for column in ("name", "verdict", "projected", "least retained", "total norm"):
        table.add_column(column, overflow="fold")
    for change in changes:
        before, after = _told(change.before), _told(change.after)
        cells = [_arrow(old, new) for old, new in zip(before, after, strict=True)]
        name = change.name if change.name.isprintable() else ascii(change.name)
        table.add_row(*map(Text, [name, *cells, f"{change.after.total_norm:.4g}"]))
    terminal().print(table)


def _told(verdict: Verdict | None) -> tuple[str, str, str]:
    """What of a verdict is compared: answer, modules that are projected, least share that is retained."""
    if verdict is None:
        return "unknown", "?", "?"
    if not verdict.accepted:
        return f"refused ({', '.join(verdict.reasons)})", "–", "–"
    if verdict.mode != "enforce":
        return "accepted UNPROJECTED", "–", "–"
    least = "–" if verdict.least_retained is None else f"{verdict.least_retained:.4f}"
    return "accepted", f"{verdict.projected} of {verdict.modules}", least


def _arrow(before: str, after: str) -> str:
    return after if before == after else f"{before} → {after}"
