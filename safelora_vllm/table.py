"""A report as a table on the terminal."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.table import Table
from rich.text import Text

from safelora_vllm.report import Report


def terminal() -> Console:
    """Standard output; wide enough for whole names when it is piped and nobody set ``COLUMNS``."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=160 if piped else None)


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the module table, then the verdict and every reason."""
    console = console or terminal()
    policy = report.policy
    if report.modules:
        table = Table(title=f"{report.adapter}: {policy.method}, select {policy.select}, {policy.mode}")
        table.add_column("module", overflow="fold")
        for column in ("rank", "similarity", "c₀", "retained", "relative norm"):
            table.add_column(column, justify="right")
        table.add_column("decision")
        for module in report.modules:
            table.add_row(
                module.name,
                str(module.rank),
                _figure(module.similarity),
                _figure(module.null_similarity),
                _figure(module.retained),
                _figure(module.relative_norm),
                Text(module.decision, style="yellow" if module.decision == "projected" else ""),
            )
        console.print(table)
    verdict = "accepted" if report.accepted else "refused"
    projected = f"{report.count('projected')} of {len(report.modules)} modules projected"
    measured = f", {projected}, total norm {_figure(report.total_norm)}" if report.modules else ""
    console.print(Text(f"{report.adapter}: {verdict}{measured}"))
    for reason in report.reasons:
        console.print(Text(f"  [{reason.code}] {reason.detail}"))


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
