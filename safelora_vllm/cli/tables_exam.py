"""Verdicts of exams on the terminal."""

from __future__ import annotations

import json

from rich.table import Table
from rich.text import Text

from safelora_vllm.cli.tables import printable, terminal
from safelora_vllm.exam.ladder import name_of
from safelora_vllm.exam.reference import Reference
from safelora_vllm.exam.sitting import Verdict


def print_reference(known: Reference) -> None:
    """Say how many probes the aligned model refuses."""
    terminal().print(
        Text(
            f"the aligned model refuses {known.refused:.0%} of all probes: the exam has {len(known.prompts)}"
        )
    )


def print_verdict(adapter: str, verdict: Verdict) -> None:
    """Print a line for each rung that was tried, then what is served."""
    console = terminal()
    wanted = f"at most {verdict.threshold:g} passes"
    if any(sat.policy.opinion for sat in verdict.rungs):
        wanted += ", with a second opinion every score"
    table = Table(title=Text(f"{printable(adapter)}: loyalty drop, nats per token, {wanted}"))
    table.add_column("rung")
    for column in ("mean", "95 % bound", "worst tenth"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for sat in verdict.rungs:
        score = sat.score
        figures = (
            f"{value:.4f}" if score.is_finite else "none" for value in (score.drop, score.bound, score.worst)
        )
        passed = "by opinion" if verdict.by_opinion(sat) else "passed"
        table.add_row(name_of(sat.policy), *figures, passed if sat.passed else "failed")
    console.print(table)
    if verdict.policy:
        console.print(Text(f"serve it by {name_of(verdict.policy)}"))
    elif reason := verdict.reason:
        console.print(Text(f"refused: [{reason.code}] {reason.message}"))


def print_calibration(threshold: float, adapters: int, as_json: bool) -> None:
    """Print the threshold that serves so many honest adapters at the mildest rung."""
    if as_json:
        print(json.dumps({"threshold": threshold}))
    else:
        given = "the adapter that was given" if adapters == 1 else f"all {adapters} adapters that were given"
        value = f"{threshold:.4f}"
        options = f"--exam-threshold {value} of a server, or --threshold {value} of this command,"
        terminal().print(Text(f"{options} serves {given} at the mildest rung"))
