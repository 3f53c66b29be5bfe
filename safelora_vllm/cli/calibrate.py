"""``safelora-vllm calibrate``: what a policy does to a random adapter, from the projector cache alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from safelora_vllm.cli.options import add_projection_options, policy_values
from safelora_vllm.errors import ProjectorCacheError, UsageError
from safelora_vllm.policy import Policy

if TYPE_CHECKING:
    from safelora_vllm.methods.calibration import Calibration, Effect, Spread
    from safelora_vllm.projectors.cache import Projector

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
        "calibrate", allow_abbrev=False, help="show what a policy does to a random adapter, and choose one"
    )
    parser.add_argument("--projectors", required=True, metavar="DIR", help="the projector cache")
    parser.add_argument(
        "--keep-random",
        type=float,
        metavar="SHARE",
        help="find input-removal's largest energy that leaves every module this share of a random "
        "adapter's effect, e.g. 0.99",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    add_projection_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the policy's effect by module type and a ladder of strengths. Exit code 0."""
    from safelora_vllm.methods.calibration import calibrate, energy_that_keeps, largest_energy, method_named
    from safelora_vllm.projectors.cache import ProjectorCache

    policy = _policy(args)
    method_named(policy.method)
    cache = ProjectorCache(args.projectors)
    if not cache.modules:
        raise ProjectorCacheError(f"the projector cache {args.projectors} has no modules; build it again")
    projectors = [cache.projector(name) for name in cache.modules]
    if policy.method == "input-removal":
        _read_energies(projectors)
    found = None
    if args.keep_random is not None:
        policy = policy.with_values({"energy": energy_that_keeps(args.keep_random, projectors)})
        found = {
            "share": args.keep_random,
            "options": _options(policy, args),
            "limited_by_cache": policy.energy == largest_energy(projectors) < 1.0,
        }
    calibration = calibrate(projectors, policy)
    if args.json:
        print(json.dumps(_document(cache.id, policy, calibration, found), indent=1))
    else:
        _print(policy, calibration, found)
    return 0


def _policy(args: argparse.Namespace) -> Policy:
    """The policy that ``serve`` would have with these options; ``--keep-random`` is about input removal."""
    values = policy_values(args)
    policy = Policy.from_mapping(values)
    if args.keep_random is not None:
        if policy.method != "input-removal":
            raise UsageError(
                f"keep-random has no effect with method {policy.method!r}: it finds input removal's energy; "
                "leave method or keep-random out"
            )
        if "energy" in values:
            raise UsageError("keep-random finds the energy; leave energy or keep-random out")
    policy.check_effective(values)
    return policy


def _read_energies(projectors: Sequence[Projector]) -> None:
    """Read what the figures need, once: some kilobytes a module."""
    from tqdm import tqdm

    for projector in tqdm(projectors, desc="Energies", unit="module", delay=1.0):
        _ = projector.energies


def _options(policy: Policy, args: argparse.Namespace) -> str:
    """The policy as options of ``serve``: what was given, and the energy that was found."""
    given = {**policy_values(args), "method": policy.method, "energy": policy.energy}
    fields = [field.name for field in dataclasses.fields(Policy) if field.name in given]
    return " ".join(f"--{field} {given[field]}" for field in fields)


def _document(
    cache_id: str, policy: Policy, calibration: Calibration, found: dict[str, Any] | None
) -> dict[str, Any]:
    strength = calibration.strength
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


def _print(policy: Policy, calibration: Calibration, found: dict[str, Any] | None) -> None:
    strength = calibration.strength
    lines = [*calibration.types.items(), ("all", calibration.whole)]
    _print_table(f"A random adapter under {_in_words(policy)}", "type", lines)
    ladder = [(f"{getattr(rung, strength):g}", line) for rung, line in calibration.ladder]
    select = calibration.ladder[0][0].select
    _print_table(f"All modules, select {select}", strength, ladder, ladder[0][1].fixed)
    if found:
        print(f"Every module keeps {found['share']:g} or more of a random adapter's effect with")
        print(f"  {found['options']}")
        if found["limited_by_cache"]:
            print("The cache keeps no larger energy; for more, build it with a larger --max-energy.")
        print("An upper bound: trained adapters lose more than random ones.")


def _in_words(policy: Policy) -> str:
    """What of the policy decides, e.g. ``safe-lora, select threshold 0.35``."""
    value = {"threshold": f" {policy.threshold:g}", "number": f" {policy.number}", "all": ""}[policy.select]
    energy = f", energy {policy.energy:g}" if policy.method == "input-removal" else ""
    return f"{policy.method}{energy}, select {policy.select}{value}"


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
