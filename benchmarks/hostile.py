"""The corpus of hostile adapters against unguarded vLLM and against this package's guarded server.

    python benchmarks/hostile.py [--base DIR] [--aligned DIR] [--projectors DIR] [--quick] [--exam]

The same cases as in the tests (tests/corpus/), loaded one after another over HTTP. After each load the
adapter is used once, and then another tenant's, whose answer must not change. A server that ended, hangs or
answers the other tenant differently is started anew. Suspected killers come last. With --exam only the
guarded server is attacked, with --exam enforce: what it projects sits an exam of eight probes first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import recording
import torch
from attack import HARM, OUTCOMES, Attack, Finding
from rich.console import Console
from rich.table import Table
from servers import SAFE_LORA, running, stop
from short_exam import short_exam
from tqdm import tqdm

from safelora_vllm.projectors.cache import ProjectorCache

sys.path.append(str(Path(__file__).resolve().parent.parent))

from tests.corpus import CORPUS, ROWS, Hostile, Target
from tests.corpus.target import sized_lora
from tests.tiny import Draft, lora_config

HERE = Path(__file__).resolve().parent
_CACHE = HERE.parent / ".cache"

SERVERS = ("unguarded", "guarded")
_HEADS = {"unguarded": "vLLM", "guarded": "guarded"}
_LAST = ("fifo", "pattern", "pipe", "gone", "cut-after")  # in the names of suspected killers


def main() -> None:
    """Attack both servers, print the table, write the JSON and the Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=Path, default=_CACHE / "models" / "base")
    parser.add_argument("--aligned", type=Path, default=_CACHE / "models" / "aligned")
    parser.add_argument("--projectors", type=Path, default=_CACHE / "projectors")
    parser.add_argument("--quick", action="store_true", help="one case of each row: a smoke test, no result")
    parser.add_argument("--exam", action="store_true", help="the guarded server alone, with --exam enforce")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(1)  # of this process, which writes the adapters; more would wait for the server's
    cases = sorted(CORPUS, key=lambda case: any(part in case.name for part in _LAST))
    if args.quick:
        cases = list({case.row: case for case in cases}.values())
    target = Target.of(ProjectorCache(args.projectors), args.base, args.aligned)
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in SERVERS[-1:] if args.exam else SERVERS:
            taken = [case for case in cases if kind == "guarded" or not case.archive]
            found[kind] = run(kind, taken, target, args, Path(scratch) / kind)
    figures = {"outcomes": OUTCOMES, **summarise(cases, found)}
    show(figures)
    markdown = as_markdown(figures)
    command = "hostile.py" + " --quick" * args.quick + " --exam" * args.exam
    path = recording.write("hostile" + "_exam" * args.exam, command, "vLLM's default", figures, args.out)
    path.with_suffix(".md").write_text(markdown)
    print(f"{markdown}\nwritten to {path}")


def run(
    kind: str, cases: list[Hostile], target: Target, args: argparse.Namespace, work: Path
) -> dict[str, Finding]:
    """Every case on one server, or on as many as it takes."""
    parts = {name: entry for name, entry in target.modules.items() if name.endswith(("q_proj", "v_proj"))}
    for seed, name in enumerate(("static", "neighbour")):
        Draft(lora_config(), sized_lora(parts, seed=seed)).write(work / name)
    options = [f"--lora-modules=static={work / 'static'}", "--max-cpu-loras=2"]
    found: dict[str, Finding] = {}
    waiting, progress = list(cases), tqdm(total=len(cases), desc=kind, unit="case")
    while waiting:
        own = work / f"server-{len(waiting)}"
        own.mkdir()
        guarded = (*short_exam(own), "--ladder=safe-lora") if args.exam else SAFE_LORA
        with running(kind, args.aligned, args.projectors, own, options, guarded) as server:
            attack = Attack(kind, server, target, work / "neighbour")
            while waiting:
                case = waiting.pop(0)
                found[case.name] = attack.attempt(case, work / f"adapter-{len(waiting)}")
                progress.update()
                if found[case.name].outcome in HARM:
                    progress.write(f"{kind}: {case.row}, {case.name}: {found[case.name].outcome}")
                    stop(server.process, patience=5.0)
                    break
    progress.close()
    return found


def summarise(cases: list[Hostile], found: Mapping[str, Mapping[str, Finding]]) -> dict[str, Any]:
    """Counts by row and server, and every finding."""
    rows = {}
    for row, title in ROWS.items():
        names = [case.name for case in cases if case.row == row]
        counts = {
            kind: dict(Counter(of[name].outcome for name in names if name in of))
            for kind, of in found.items()
        }
        rows[row] = {"title": title, "cases": len(names), **counts}
    every: dict[str, Any] = {case.name: {"row": case.row} for case in cases}
    for kind, of in found.items():
        for name, finding in of.items():
            every[name][kind] = asdict(finding)
    return {"rows": rows, "cases": every}


def columns(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The outcomes that happened, in their order: (server, outcome)."""
    rows = figures["rows"].values()
    return [
        (kind, name)
        for kind in SERVERS
        for name in OUTCOMES
        if any(name in row.get(kind, {}) for row in rows)
    ]


def cells(figures: Mapping[str, Any]) -> list[list[str]]:
    """A line per row of the attack table, and the sums."""
    wanted, rows = columns(figures), list(figures["rows"].values())
    lines = [
        [row["title"], str(row["cases"]), *(str(row[kind].get(name, "") or "") for kind, name in wanted)]
        for row in rows
    ]
    sums = [str(sum(row[kind].get(name, 0) for row in rows)) for kind, name in wanted]
    return [*lines, ["all", str(sum(row["cases"] for row in rows)), *sums]]


def show(figures: Mapping[str, Any]) -> None:
    """Print the table."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(caption="vLLM takes no archives, so it was not asked about those")
    table.add_column("attack", min_width=32)
    table.add_column("cases", justify="right")
    for kind, name in columns(figures):
        table.add_column(f"{_HEADS[kind]}\n{name}", justify="right", no_wrap=True)
    for line in cells(figures):
        table.add_row(*line)
    console.print(table)


def as_markdown(figures: Mapping[str, Any]) -> str:
    """The same for the README."""
    heads = ["attack", "cases", *(f"{_HEADS[kind]}: {outcome}" for kind, outcome in columns(figures))]
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *cells(figures)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
