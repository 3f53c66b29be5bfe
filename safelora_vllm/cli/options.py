"""Command-line options that several commands share, with the words that users script against."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from safelora_vllm.methods import METHODS
from safelora_vllm.policy import MODES, SELECTIONS, Policy
from safelora_vllm.store.layout import DEFAULT_ROOT

_DEFAULT = Policy()
ADAPTER = "folder that PEFT saved, or a .tar, .tar.gz or .zip of one"
STORE = f"the server's --adapter-store; default: {DEFAULT_ROOT}"
_FIELD = re.compile(r"`([a-z_]+)`")
# Fields and arguments whose options have their names.
_OPTIONS = {field.name for field in dataclasses.fields(Policy)} | {
    "all", "base_model", "device", "dtype", "exact", "form", "gpu_memory", "jobs", "json", "keep_random",
    "lora_rank", "max_energy", "modules", "out", "projector_host_memory", "projector_memory",
    "ray", "trust_served_model",
}  # fmt: skip
UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def add_gate_options(parser: argparse.ArgumentParser) -> None:
    """Those of `add_policy_options`, --projectors and --device."""
    add_projectors_option(parser)
    add_policy_options(parser)
    parser.add_argument("--device", default="cpu", help="where to project; default: cpu")


def add_projectors_option(parser: argparse.ArgumentParser) -> None:
    """--projectors, which every command needs that knows a policy."""
    parser.add_argument(
        "--projectors", required=True, metavar="DIR", help="folder of the projector cache, made by build"
    )


def add_policy_options(parser: argparse.ArgumentParser) -> None:
    """Those of `add_projection_options`, --max-relative-norm, --max-total-norm and --mode."""
    group = add_projection_options(parser)
    group.add_argument(
        "--max-relative-norm",
        type=float,
        metavar="X",
        help=f"refuse adapters larger than X times a module's weight; default: {_DEFAULT.max_relative_norm}",
    )
    group.add_argument(
        "--max-total-norm",
        type=float,
        metavar="X",
        help="refuse adapters larger than X times the weights of all modules in the cache together; "
        f"default: {_DEFAULT.max_total_norm}",
    )
    group.add_argument(
        "--mode",
        metavar=f"{{{','.join(MODES)}}}",  # no choices: a policy says what a former word is called now
        help="report-only serves adapters UNPROJECTED and only reports; default: enforce, which projects",
    )


def add_projection_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--method, --select, --threshold, --number, --energy: the policy's share in what is projected."""
    group = parser.add_argument_group("policy")
    readers = {name: method for name, method in METHODS.items() if "energy" in method.options}
    group.add_argument(
        "--method", choices=METHODS, help=f"how modules are projected; default: {_DEFAULT.method}"
    )
    group.add_argument(
        "--select",
        choices=SELECTIONS,
        help=f"which modules are projected; default: {_by_method({n: m.select for n, m in METHODS.items()})}",
    )
    group.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help=f"with --select threshold: project where similarity ≤ T; default: {_DEFAULT.threshold}",
    )
    group.add_argument(
        "--number",
        type=int,
        metavar="K",
        help=f"with --select number: project the K least similar modules; default: {_DEFAULT.number}",
    )
    group.add_argument(
        "--energy",
        type=float,
        metavar="E",
        help="; ".join(f"{name}: {method.options['energy'].help}" for name, method in readers.items())
        + f"; default: {_by_method({name: method.energy for name, method in readers.items()})}",
    )
    return group


def _by_method(values: Mapping[str, object]) -> str:
    """The default method's value, then those that differ, e.g. ``0.2; csulora: 0.95``."""
    default = values[_DEFAULT.method]
    others = [f"{name}: {value}" for name, value in values.items() if value != default]
    return "; ".join([str(default), *others])


def chosen_policy(args: argparse.Namespace) -> Policy:
    """The policy of the options.

    Raises:
        PolicyError: a value is out of range, or has no effect with the others.
    """
    values = policy_values(args)
    policy = Policy.from_mapping(values)
    policy.check_effective(values)
    return policy


def as_options(message: str) -> str:
    """A message in the words of the command line, such as --max-energy where it has `max_energy`."""
    return _FIELD.sub(
        lambda found: "--" + found[1].replace("_", "-") if found[1] in _OPTIONS else found[0], message
    )


def policy_values(args: argparse.Namespace) -> dict[str, Any]:
    """The policy options that were given."""
    values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Policy)}
    return {name: value for name, value in values.items() if value is not None}


def size(text: str) -> int:
    """Bytes from ``500MB``, ``10GB``, ``1.5GiB`` or a plain number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?I?B)?", text.strip().upper(), re.ASCII)
    if not found or (found[2] or "") not in UNITS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a valid size: expected bytes, or e.g. 500MB, 10GB, 1.5GiB"
        )
    return int(float(found[1]) * UNITS[found[2] or ""])


def size_text(nbytes: int) -> str:
    """The shortest text that `size` reads as this: ``2GiB``."""
    unit = max((unit for unit in UNITS if unit and nbytes % UNITS[unit] == 0), key=UNITS.__getitem__)
    return f"{nbytes // UNITS[unit]}{unit.replace('I', 'i')}"


def route_access(text: str) -> tuple[str, str]:
    """Both halves of ``METHOD /path=WHO``; their values are checked where routes are known."""
    name, equals, word = text.rpartition("=")
    if not equals:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not valid: expected 'METHOD /path=WHO', as in 'GET /x=users'"
        )
    return name.strip(), word.strip()
