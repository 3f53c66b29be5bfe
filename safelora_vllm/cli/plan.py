"""``safelora-vllm plan``: what a policy takes of disk, memory and time, before anything is built."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from safelora_vllm.cli import DONE
from safelora_vllm.cli.options import add_policy_options, chosen_policy, size
from safelora_vllm.errors import UsageError
from safelora_vllm.methods import METHODS
from safelora_vllm.policy import Policy

if TYPE_CHECKING:
    from safelora_vllm.projectors.plan import Plan
    from safelora_vllm.projectors.sizes import ModuleGroup

_GIB, _MIB = 2**30, 2**20


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser(
        "plan", allow_abbrev=False, help="show what a policy takes of disk, memory and time, before a build"
    )
    parser.add_argument(
        "--aligned",
        required=True,
        metavar="DIR",
        help="folder of the aligned model; of its weights only the headers are read",
    )
    parser.add_argument(
        "--projectors",
        metavar="DIR",
        help="folder of a projector cache of that model, whose spectra replace the assumed one",
    )
    parser.add_argument(
        "--modules", nargs="+", default=[], metavar="NAME", help="as for build; default: all linear layers"
    )
    parser.add_argument("--max-energy", type=float, metavar="E", help="as for build")
    parser.add_argument("--exact", action="store_true", help="as for build: Ĉ or V too")
    parser.add_argument(
        "--lora-rank",
        type=int,
        default=16,
        metavar="N",
        help="of an adapter, the largest that the server accepts; default: 16",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="memory of the GPU that the gate is on; default: of the GPU that torch sees, if any",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where the build would compute, for its time; default: cpu",
    )
    parser.add_argument(
        "--projector-memory", type=size, metavar="N", help="as for serve; default: what the policy takes"
    )
    parser.add_argument(
        "--projector-host-memory", type=size, default=0, metavar="N", help="as for serve; default: 0"
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    add_policy_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan of a policy."""
    policy, memory = chosen_policy(args), args.gpu_memory
    if memory is not None and not 0 < memory < math.inf:
        raise UsageError(f"`gpu_memory` is {memory:g}: expected GiB, a number above 0")
    from safelora_vllm.api import plan_projectors

    plan = plan_projectors(
        args.aligned,
        policy,
        projectors=args.projectors,
        modules=args.modules,
        max_energy=args.max_energy,
        exact=args.exact,
        lora_rank=args.lora_rank,
        gpu_memory=None if memory is None else math.ceil(memory * _GIB),
        device=args.device,
        projector_memory=args.projector_memory,
        projector_host_memory=args.projector_host_memory,
    )
    if args.json:
        print(json.dumps(_document(plan, policy), indent=1))
    else:
        _print(plan, policy)
    return DONE


def _document(plan: Plan, policy: Policy) -> dict[str, Any]:
    used = ("method", "select", "threshold", "number", "energy")
    return {
        "policy": {field: getattr(policy, field) for field in used},
        "assumed_spectrum": plan.assumed,
        "max_energy": plan.max_energy,
        "modules": plan.modules,
        "shapes": [
            {
                "shape": group.shape,
                "modules": len(group.names),
                "kinds": group.kinds,
                "form": group.form,
                "directions": {
                    "cache": max(group.kept),
                    "R": max(group.input_directions),
                    "L": max(group.output_directions),
                },
                "disk_bytes": group.disk.total,
            }
            for group in plan.groups
        ],
        "disk_bytes": plan.disk.total,
        "disk": dataclasses.asdict(plan.disk),
        "disk_bytes_at_most": plan.disk_at_most,
        "device_bytes": plan.device_bytes,
        "device": dataclasses.asdict(plan.held),
        "device_bytes_at_most": plan.held_at_most,
        "host_bytes": plan.placement.host_bytes,
        "read_bytes": plan.placement.disk_bytes,
        "least_bytes": plan.least_bytes,
        "transient_bytes": plan.transient_bytes,
        "context_bytes": plan.context_bytes,
        "gate_bytes": plan.gate_bytes,
        "gpu_memory": plan.gpu_memory,
        "gpu_share": plan.gpu_share,
        "gpus": plan.gpus,
        "fits": plan.fits,
        "weight_bytes": plan.weight_bytes,
        "lora_rank": plan.lora_rank,
        "adapter_bytes": {"float32": plan.adapter_uploaded, "bfloat16": plan.adapter_served},
        "build_device": plan.build_device,
        "build_seconds": plan.build_seconds,
    }


def _print(plan: Plan, policy: Policy) -> None:
    from rich.table import Table
    from rich.text import Text

    from safelora_vllm.cli.tables import terminal

    console = terminal()
    shapes = Table(title=f"{plan.modules} modules under {policy.summary}")
    shapes.add_column("modules", justify="right")
    shapes.add_column("kind", overflow="fold")
    for column in ("d_out × d_in", "k in cache", "k of R read", "k of L read", "on disk"):
        shapes.add_column(column, justify="right", no_wrap=True)
    for group in plan.groups:
        shapes.add_row(*_cells(group))
    console.print(shapes)
    sizes = Table(title="Sizes")
    sizes.add_column("what", overflow="fold")
    sizes.add_column("size", justify="right", no_wrap=True)
    for number, section in enumerate(_sections(plan)):
        if number:
            sizes.add_section()
        for what, nbytes in section:
            sizes.add_row(what, nbytes)
    console.print(sizes)
    for sentence in [*_notes(plan), *_advice(plan, policy)]:
        console.print(Text(sentence))


def _cells(group: ModuleGroup) -> list[str]:
    kinds = ", ".join(kind if kind.isprintable() else ascii(kind) for kind in group.kinds)
    counts = (group.kept, group.input_directions, group.output_directions)
    rows, columns = group.shape
    shown = [_range(count) for count in counts]
    return [str(len(group.names)), kinds, f"{rows} × {columns}", *shown, _size(group.disk.total)]


def _range(counts: tuple[int, ...]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}–{high}"


def _sections(plan: Plan) -> list[list[tuple[str, str]]]:
    disk, held, placement = plan.disk, plan.held, plan.placement
    operator = held.operator - placement.host_bytes - placement.disk_bytes
    where = "GPU" if plan.on_gpu else "CPU"
    cache = [
        ("projector cache on disk", _size(disk.total)),
        ("  Ĉ or V", _size(disk.operator)),
        ("  R", _size(disk.input_basis)),
        ("  L", _size(disk.output_basis)),
        ("  shares of energy", _size(disk.energy)),
    ]
    gate = [
        (f"gate on a {where}", _size(plan.gate_bytes)),
        ("  Ĉ or V", _size(operator)),
        ("  R", _size(held.input_basis)),
        ("  L", _size(held.output_basis)),
        *([] if plan.on_gpu else [("  shares of energy", _size(held.energy))]),
        ("  for the work of an adapter", _size(plan.transient_bytes)),
    ]
    if plan.on_gpu:
        gate.append(
            ("  allowance for CUDA's context and libraries, as on an H100", _size(plan.context_bytes))
        )
    if plan.assumed:
        cache.append(("  at most, if V has no dominant directions", _size(plan.disk_at_most)))
        gate.append(("  projectors at most, if V has no dominant directions", _size(plan.held_at_most)))
    if placement.host_bytes:
        gate.append(("Ĉ or V in pinned host memory", _size(placement.host_bytes)))
    if placement.disk_bytes:
        gate.append(("Ĉ or V that it reads from disk at each use", _size(placement.disk_bytes)))
    if held.operator:  # in bytes, so that it can be given as it stands
        gate.append(("smallest --projector-memory", f"{plan.least_bytes}"))
    if plan.gpu_memory and plan.gpu_share is not None:
        gate.append((f"the gate's share of the GPU's {_size(plan.gpu_memory)}", f"{plan.gpu_share:.1%}"))
    adapter = [
        (
            f"an adapter of all modules at rank {plan.lora_rank}, uploaded in float32",
            _size(plan.adapter_uploaded),
        ),
        ("the same, served in bfloat16", _size(plan.adapter_served)),
    ]
    time = [(f"build on {plan.build_device} here, estimated", _duration(plan.build_seconds))]
    return [cache, gate, adapter, time]


def _notes(plan: Plan) -> list[str]:
    notes = []
    if plan.assumed:
        notes.append(
            f"Assumed before a build: V = G diag(j^-0.4), G Gaussian, --max-energy {plan.max_energy:g}. "
            "The k of such a V is right to about 10 % at energy 0.2, to 4 % from 0.8 on. Another V may have "
            "quite another k. --projectors takes k from a cache."
        )
    notes.append(
        "The build's time is an estimate, from one small module that was built here now and from the bytes "
        "to hash. The disk's time is not in it."
    )
    return notes


def _advice(plan: Plan, policy: Policy) -> list[str]:
    """Of a gate that does not fit beside the model."""
    if plan.fits is not False or plan.gpu_memory is None or plan.gpus is None:
        return []
    each = "" if plan.gpus == 1 else f" on each of {plan.gpus} GPUs"
    weights = _size(plan.weight_bytes // plan.gpus)
    cause = f"The gate does not fit beside the model's {weights} of weights{each}"
    working = plan.placement.transient - plan.placement.passing
    if plan.context_bytes + working + plan.weight_bytes / plan.gpus >= plan.gpu_memory:
        return [
            f"{cause}, whatever its projectors take: take a larger GPU, or keep the gate off it with the "
            "server's --gate-device cpu."
        ]
    smaller = "a smaller --energy"
    if METHODS[policy.method].reads_operator or policy.select not in ("all", "none"):
        method = "--method input-removal and " if METHODS[policy.method].reads_operator else ""
        less = "neither Ĉ nor V" if plan.held.operator else "less of L"
        smaller = f"{method}--select all, which read{'' if method else 's'} {less}"
    budget, least = "", plan.least_bytes + plan.context_bytes + plan.weight_bytes / plan.gpus
    if plan.held.operator and least <= plan.gpu_memory:
        budget = (
            f"set --projector-memory to {plan.least_bytes} or more, so that it reads the rest from disk at "
            "each use, or "
        )
    return [f"{cause}: {budget}take {smaller}."]


def _size(nbytes: int) -> str:
    if nbytes == 0:
        return "0"
    if nbytes >= _GIB:
        return f"{nbytes / _GIB:.1f} GiB"
    return f"{nbytes / _MIB:.1f} MiB" if nbytes >= _MIB / 10 else f"{nbytes / 1024:.1f} KiB"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
