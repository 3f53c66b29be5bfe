"""Reports as tables on the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from safelora_vllm.bulk.catalogue import FOLDER
from safelora_vllm.bulk.run import BulkReport
from safelora_vllm.cli.options import as_options
from safelora_vllm.errors import codes_of, named
from safelora_vllm.policy import NOTHING, Policy
from safelora_vllm.report import Report

_MOST_ROWS, _MOST_REASONS = 50, 3
_SERVED_RANK = 16  # vLLM's --max-lora-rank where nobody sets it

CHANGES_NOTHING = (
    "the adapter changes nothing: each of its modules has an A or a B of zeros, as before any training"
)


def terminal() -> Console:
    """Standard output; wide enough for whole names when it is piped and nobody set ``COLUMNS``."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=160 if piped else None)


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the module table, then the verdict and every reason."""
    console = console or terminal()
    policy = report.policy
    if report.modules:
        table = Table(title=Text(f"{printable(report.adapter)}: {policy.summary}, {policy.mode}"))
        table.add_column("module", overflow="fold")
        for column in ("rank", "similarity", "c₀", "retained", "relative norm"):
            table.add_column(column, justify="right")
        table.add_column("decision")
        for module in report.modules:
            table.add_row(
                module.name,
                str(module.rank),
                _figure(module.similarity)
                + (f" ± {_figure(module.similarity_error)}" if module.similarity_error else ""),
                _figure(module.null_similarity),
                _figure(module.retained),
                _figure(module.relative_norm),
                Text(
                    module.decision + (" (uncertain)" if module.uncertain else ""),
                    style="yellow" if module.decision == "projected" else "",
                ),
            )
        console.print(table)
    verdict = "accepted" if report.accepted else "refused"
    share = f"{report.count('projected')} of {len(report.modules)} modules"
    if report.modules and policy.enforcing:
        verdict += f", {share} {'projected' if report.accepted else 'would have been projected'}"
    elif report.modules:
        would = "refuse it" if report.reasons else f"project {share}"
        verdict += f" unprojected, as in report-only mode; enforcing would {would}"
    console.print(Text(f"{printable(report.adapter)}: {verdict}"))
    if report.uncertain:
        console.print(Text("  " + uncertain_note(report.uncertain)))
    if report.modules:
        console.print(
            Text(
                f"  total norm {report.total_norm:.4g} (allowed {policy.max_total_norm:g}), largest module "
                f"{max(report.values('relative_norm')):.4g} (allowed {policy.max_relative_norm:g})"
            )
        )
    print_rank([report], console, "  ")
    if report.changes_nothing:
        console.print(Text("  " + CHANGES_NOTHING))
    for reason in report.reasons:
        console.print(Text(f"  [{reason.code}] {as_options(reason.message)}"))


def print_summary(reports: Sequence[Report], console: Console | None = None) -> None:
    """Print a line for each report, and the norms that caps have to leave room for."""
    console = console or terminal()
    policy = reports[0].policy
    table = Table(title=f"{NOTHING if policy.selects_none else policy.method}, {policy.mode}")
    table.add_column("adapter", overflow="fold")
    uncertain = sum(report.uncertain for report in reports)
    counted = ("modules", "projected", *(("uncertain",) if uncertain else ()))
    for column in (*counted, "total norm", "largest module norm"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for report in reports:
        figures = ["–"] * (len(counted) + 2)
        if report.modules:
            counts = (len(report.modules), report.count("projected"), report.uncertain)[: len(counted)]
            norms = (report.total_norm, max(report.values("relative_norm")))
            figures = [*map(str, counts), *(f"{norm:.4g}" for norm in norms)]
        codes = ", ".join(codes_of(report.reasons))
        verdict = "accepted" if report.accepted else "refused"
        verdict += f": {codes}" if codes else ", changes nothing" if report.changes_nothing else ""
        table.add_row(Text(printable(report.adapter)), *figures, Text(verdict))
    console.print(table)
    if measured := [report for report in reports if report.modules]:
        total = max(report.total_norm for report in measured)
        module = max(norm for report in measured for norm in report.values("relative_norm"))
        console.print(Text(f"largest: total norm {total:.4g}, of a module {module:.4g}"))
    print_rank(reports, console)
    if uncertain:
        console.print(Text(uncertain_note(uncertain)))


def print_rank(reports: Sequence[Report], console: Console, indent: str = "") -> None:
    """Say which option a server needs, where a rank is above vLLM's default."""
    rank = max((module.rank for report in reports for module in report.modules), default=0)
    if rank > _SERVED_RANK:
        console.print(Text(f"{indent}largest rank {rank}: serve with --max-lora-rank {rank} or more"))


def uncertain_note(modules: int) -> str:
    """Why so many modules are uncertain, and what makes them certain."""
    return (
        f"the selection of {modules} modules is uncertain: the projector cache is thin and gives "
        "their similarity as an interval. With a cache built with --exact some of them may stay as they are"
    )


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def print_bulk(report: BulkReport, policy: Policy) -> None:
    """Print the adapters of a folder that were not accepted, then how many there are of each answer."""
    console = terminal()
    others = [record for record in report.records if record.answer != "accepted"]
    if others:
        table = Table(title=f"{policy.summary}, {policy.mode}")
        for column in ("adapter", "answer", "reasons"):
            table.add_column(column, overflow="fold")
        for record in others[:_MOST_ROWS]:
            reasons = "\n".join(f"[{r.code}] {as_options(r.message)}" for r in record.reasons[:_MOST_REASONS])
            table.add_row(*(Text(printable(cell)) for cell in (record.name, record.answer)), Text(reasons))
        console.print(table)
    if len(others) > _MOST_ROWS:
        console.print(Text(f"and {len(others) - _MOST_ROWS} more that were not accepted"))
    counts = ", ".join(f"{report.count(answer)} {answer}" for answer in ("accepted", "refused", "failed"))
    how = "" if policy.enforcing else "; report-only mode: written UNPROJECTED"
    console.print(
        Text(f"{len(report.records)} adapters: {counts}; {len(report.unchanged)} of them as before{how}")
    )
    if report.ignored:
        ignored = named([printable(name) for name in report.ignored])
        console.print(Text(f"left out, neither folder nor archive: {ignored}"))
    if uncertain := sum(record.uncertain for record in report.records):
        console.print(Text(uncertain_note(uncertain)))
    console.print(Text(f"results in {report.folder}, a record of each in {report.folder / FOLDER}"))


def printable(text: str) -> str:
    """A name that may come from a tenant, without control characters and bytes that are no text."""
    return text if text.isprintable() else ascii(text)[1:-1]
