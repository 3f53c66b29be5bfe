"""``safelora-vllm project``: an adapter, or all adapters of a folder, through the gate, offline."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from safelora_vllm.cli import DONE, PROBLEMS, REFUSED
from safelora_vllm.cli.options import ADAPTER, add_gate_options, chosen_policy, size
from safelora_vllm.cli.remote import REMOTE, on_disk
from safelora_vllm.errors import UsageError

if TYPE_CHECKING:
    from safelora_vllm.bulk.run import BulkReport
    from safelora_vllm.policy import Policy

_OF_ALL = ("jobs", "projector_memory", "ray", "json")  # options that mean nothing without --all


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser(
        "project", allow_abbrev=False, help="pass adapters through the gate and write the results"
    )
    parser.add_argument("adapter", nargs="?", help=f"{ADAPTER}, {REMOTE}; default: required without --all")
    parser.add_argument("--all", metavar="FOLDER", help="project all folders and archives in FOLDER")
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="new folder for the projected adapter; with --all a folder for the results, maybe with those "
        "of earlier runs",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="with --all: processes at once; default: 1, with --ray all"
    )
    parser.add_argument(
        "--projector-memory",
        type=size,
        metavar="N",
        help="with --all: most bytes that each process takes for projectors and for an adapter's work. The "
        "rest is read at each use",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="with --all: the Ray cluster that does the work, such as auto or ray://HOST:10001",
    )
    parser.add_argument(
        "--json", action="store_true", help="with --all: print the records as JSON, one a line"
    )
    parser.add_argument(
        "--base-model",
        metavar="DIR_OR_HUB_ID",
        help="base_model_name_or_path of the new adapters; default: the --aligned that build was given",
    )
    add_gate_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the projected adapters and say what was done."""
    if (args.adapter is None) == (args.all is None):
        raise UsageError("expected either an adapter or `all` with a folder of adapters")
    policy = chosen_policy(args)
    return _one(args, policy) if args.all is None else _all(args, policy)


def _one(args: argparse.Namespace, policy: Policy) -> int:
    for name in _OF_ALL:
        if getattr(args, name):
            raise UsageError(f"`{name}` has no effect without `all`: leave it out")
    from safelora_vllm.api import project_adapter
    from safelora_vllm.api.opened import opened_cache, warn_of_truncation
    from safelora_vllm.cli.tables import CHANGES_NOTHING, uncertain_note

    cache = opened_cache(args.projectors)
    warn_of_truncation(policy, cache)
    with on_disk(args.adapter) as path:
        report = project_adapter(
            path, cache, args.out, policy, device=args.device, base_model=args.base_model
        )
    share = f"{report.count('projected')} of {len(report.modules)} modules"
    if policy.enforcing:
        print(f"{share} projected, written to {args.out}")
    else:
        print(f"report-only mode: written UNPROJECTED to {args.out}; enforcing would project {share}")
    if report.uncertain:
        print(uncertain_note(report.uncertain))
    if report.changes_nothing:
        print(CHANGES_NOTHING)
    return DONE


def _all(args: argparse.Namespace, policy: Policy) -> int:
    from safelora_vllm.api import project_adapters
    from safelora_vllm.api.opened import opened_cache, warn_of_truncation
    from safelora_vllm.cli.tables import print_bulk

    cache = opened_cache(args.projectors)
    warn_of_truncation(policy, cache)
    report = project_adapters(
        args.all,
        cache,
        args.out,
        policy,
        device=args.device,
        base_model=args.base_model,
        jobs=args.jobs,
        projector_memory=args.projector_memory,
        ray=args.ray,
    )
    if args.json:
        for record in report.to_dicts():
            print(json.dumps(record, allow_nan=False))
    else:
        print_bulk(report, policy)
    return _exit_code(report)


def _exit_code(report: BulkReport) -> int:
    if report.count("failed"):
        return PROBLEMS
    return REFUSED if report.count("refused") else DONE
