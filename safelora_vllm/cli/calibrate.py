"""``safelora-vllm calibrate``: what a policy does to a random adapter, from the projector cache alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safelora_vllm.cli import DONE
from safelora_vllm.cli.options import (
    add_projection_options,
    add_projectors_option,
    chosen_policy,
    policy_values,
)
from safelora_vllm.errors import UsageError
from safelora_vllm.methods.method import Effect, Spread
from safelora_vllm.policy import Policy

if TYPE_CHECKING:
    from safelora_vllm.methods.calibration import Calibration

_TITLES = {
    "taken": "directions k/d_in\nmin–median–max",
    "energy": "alignment's\nenergy",
    "null_similarity": "c₀\nmin–median–max",
    "norm_kept": "norm if projected\nmin–median–max",
    "effect_kept": "effect\nkept",
    "least_kept": "least\nkept",
}
_LAST = ("effect_kept", "least_kept")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser(
        "calibrate",
        allow_abbrev=False,
        help="show what a policy does to a random adapter, or find a strength",
    )
    add_projectors_option(parser)
    parser.add_argument(
        "--keep-random",
        type=float,
        metavar="SHARE",
        help="find the largest strength that leaves every module this share of a random adapter's effect, "
        "e.g. 0.99",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    add_projection_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the policy's effect by module type and a ladder of strengths."""
    policy = _policy(args)
    from safelora_vllm.api import calibrate_policy
    from safelora_vllm.projectors.cache import ProjectorCache

    cache = ProjectorCache(args.projectors)
    calibration, found = calibrate_policy(cache, policy, keep_random=args.keep_random), None
    if args.keep_random is not None:
        found = {
            "share": args.keep_random,
            "options": _options(calibration, args),
            "limited_by_cache": calibration.limited_by_cache,
        }
    if args.json:
        print(json.dumps(_document(cache.id, calibration, found), indent=1))
    else:
        _print(calibration, found)
    return DONE


def _policy(args: argparse.Namespace) -> Policy:
    """The policy that ``serve`` would have with these options."""
    from safelora_vllm.methods.calibration import calibrator_of, search_of

    policy = Policy.from_mapping(policy_values(args))
    calibrator_of(policy.method)
    if args.keep_random is not None:
        strength = search_of(policy.method).field
        if getattr(args, strength) is not None:
            raise UsageError(f"`keep_random` finds the {strength}: leave `{strength}` or `keep_random` out")
    return chosen_policy(args)


def _options(calibration: Calibration, args: argparse.Namespace) -> str:
    """The policy as options of ``serve``: what was given, and the strength that was found."""
    policy, strength = calibration.policy, calibration.strength
    given = {**policy_values(args), "method": policy.method, strength: getattr(policy, strength)}
    fields = [field.name for field in dataclasses.fields(Policy) if field.name in given]
    return " ".join(f"--{field} {given[field]}" for field in fields)


def _document(cache_id: str, calibration: Calibration, found: dict[str, Any] | None) -> dict[str, Any]:
    policy, strength = calibration.policy, calibration.strength
    used = ("method", "select", "threshold", "number", "energy")
    return {
        "projectors": cache_id,
        "policy": {field: getattr(policy, field) for field in used},
        "keep_random": found,
        "types": [{"type": name, **dataclasses.asdict(line)} for name, line in calibration.types.items()],
        "all": dataclasses.asdict(calibration.whole),
        "ladder": [
            {"strength": strength, "value": getattr(rung, strength), **dataclasses.asdict(line)}
            for rung, line in calibration.ladder
        ],
    }


def _print(calibration: Calibration, found: dict[str, Any] | None) -> None:
    policy, strength = calibration.policy, calibration.strength
    lines = [*calibration.types.items(), ("all", calibration.whole)]
    _print_table(f"A random adapter under {policy.summary}", "type", lines)
    ladder = [(f"{getattr(rung, strength):g}", line) for rung, line in calibration.ladder]
    select = calibration.ladder[0][0].select
    _print_table(f"All modules, select {select}", strength, ladder, ladder[0][1].fixed)
    if found:
        print(f"Every module keeps {found['share']:g} or more of a random adapter's effect with")
        print(f"  {found['options']}")
        if found["limited_by_cache"]:
            print("The cache keeps no larger energy; for more, build it with a larger --max-energy.")
        print("An upper bound: trained adapters lose more than random ones.")


def _print_table(
    title: str, first: str, lines: Sequence[tuple[str, Effect]], left_out: Sequence[str] = ()
) -> None:
    """One line per effect, with the name of it in the column ``first``."""
    from rich.table import Table
    from rich.text import Text

    from safelora_vllm.cli.tables import terminal

    names = [field.name for field in dataclasses.fields(lines[0][1])]
    own = [name for name in names if name not in ("modules", "projected", *_LAST, *left_out)]
    figures = [*own, *(name for name in _LAST if name in names)]
    table = Table(title=title)
    table.add_column(first, overflow="fold")
    table.add_column("modules\nprojected", justify="right", no_wrap=True)
    for name in figures:
        table.add_column(_TITLES.get(name, name), justify="right", no_wrap=True)
    for label, line in lines:
        cells = [f"{line.projected}/{line.modules}", *(_cell(getattr(line, name)) for name in figures)]
        table.add_row(Text(label if label.isprintable() else ascii(label)), *cells)
    terminal().print(table)


def _cell(figure: float | Spread) -> str:
    if isinstance(figure, float):
        return f"{figure:.4f}"
    return "–".join(f"{value:.4f}" for value in (figure.min, figure.median, figure.max))
