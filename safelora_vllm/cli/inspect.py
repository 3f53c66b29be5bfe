"""``safelora-vllm inspect``: what the gate would do with adapters."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safelora_vllm.cli import DONE, REFUSED
from safelora_vllm.cli.options import ADAPTER, add_gate_options, chosen_policy
from safelora_vllm.errors import UsageError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser(
        "inspect", allow_abbrev=False, help="show what the gate would do with an adapter"
    )
    parser.add_argument(
        "adapter", nargs="+", help=f"{ADAPTER}; several get one line each and their largest norms"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the report as JSON; several reports one a line"
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="also write the page's view of one adapter as a file that needs no server",
    )
    parser.add_argument(
        "--png",
        metavar="FILE",
        help="also draw the heat maps of one adapter; needs matplotlib (extra picture)",
    )
    add_gate_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the report of each adapter."""
    policy = chosen_policy(args)
    if missing := [adapter for adapter in args.adapter if not Path(adapter).exists()]:
        raise UsageError(f"there is nothing at {', '.join(map(repr, missing))}: expected a {ADAPTER}")
    if (args.html or args.png) and len(args.adapter) > 1:
        raise UsageError("--html and --png show one adapter: give one, or leave them out")
    from tqdm import tqdm

    from safelora_vllm.api import inspect_adapter
    from safelora_vllm.api.opened import opened_cache, warn_of_truncation
    from safelora_vllm.cli.tables import print_report, print_summary
    from safelora_vllm.page.export import write_html
    from safelora_vllm.page.picture import write_png

    cache, several = opened_cache(args.projectors), len(args.adapter) > 1
    warn_of_truncation(policy, cache)
    reports = [
        inspect_adapter(adapter, cache, policy, device=args.device)
        for adapter in tqdm(args.adapter, desc="Adapters", unit="adapter", disable=not several)
    ]
    if args.json and several:
        for report in reports:
            print(json.dumps(report.to_dict(), allow_nan=False))
    elif args.json:
        print(reports[0].to_json())
    elif several:
        print_summary(reports)
    else:
        print_report(reports[0])
    if args.html:
        write_html(reports[0], Path(args.html))
    if args.png:
        write_png(reports[0], Path(args.png))
    return DONE if all(report.accepted for report in reports) else REFUSED
