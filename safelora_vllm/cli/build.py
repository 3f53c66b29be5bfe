"""``safelora-vllm build``: the projector cache of a model pair."""

from __future__ import annotations

import argparse

from safelora_vllm.cli import DONE


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser(
        "build", allow_abbrev=False, help="build the projector cache of a model pair"
    )
    parser.add_argument("--base", required=True, metavar="DIR_OR_HUB_ID", help="before alignment")
    parser.add_argument("--aligned", required=True, metavar="DIR_OR_HUB_ID", help="the served model")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--modules", nargs="+", default=[], help="e.g. q_proj v_proj; default: all linear")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 (default) or float16")
    parser.add_argument("--form", default="auto", help="auto (default), dense or factored")
    parser.add_argument("--device", default="cpu", help="where to compute; default: cpu")
    parser.add_argument(
        "--max-energy", type=float, default=0.95, help="largest --energy to serve; default: 0.95"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build the cache and say where it is."""
    from safelora_vllm.api import build_projectors

    cache = build_projectors(
        args.base,
        args.aligned,
        args.out,
        modules=args.modules,
        dtype=args.dtype,
        form=args.form,
        device=args.device,
        max_energy=args.max_energy,
    )
    print(f"projector cache written to {cache.folder}")
    return DONE
