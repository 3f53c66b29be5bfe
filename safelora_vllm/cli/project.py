"""``safelora-vllm project``: an adapter through the gate, offline."""

from __future__ import annotations

import argparse

from safelora_vllm.cli import DONE
from safelora_vllm.cli.options import ADAPTER, add_gate_options, chosen_policy


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser(
        "project", allow_abbrev=False, help="pass an adapter through the gate and write the result"
    )
    parser.add_argument("adapter", help=ADAPTER)
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the projected adapter")
    parser.add_argument(
        "--base-model",
        metavar="DIR_OR_HUB_ID",
        help="base_model_name_or_path of the new adapter; default: the --aligned that build was given",
    )
    add_gate_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the projected adapter and say what was done."""
    policy = chosen_policy(args)
    from safelora_vllm.api import project_adapter
    from safelora_vllm.cli.tables import CHANGES_NOTHING, uncertain_note

    report = project_adapter(
        args.adapter, args.projectors, args.out, policy, device=args.device, base_model=args.base_model
    )
    share = f"{report.count('projected')} of {len(report.modules)} modules"
    if policy.enforcing:
        print(f"{share} projected, written to {args.out}")
    else:
        print(f"report-only mode: written UNPROJECTED to {args.out}; enforcing would project {share}")
    if report.uncertain:
        print(uncertain_note(report))
    if report.changes_nothing:
        print(CHANGES_NOTHING)
    return DONE
