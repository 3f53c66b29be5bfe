"""``safelora-vllm build``: the projector cache of a model pair."""

from __future__ import annotations

import argparse

from safelora_vllm.cli import DONE


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser(
        "build", allow_abbrev=False, help="build the projector cache of a model pair"
    )
    parser.add_argument("--base", required=True, metavar="DIR_OR_HUB_ID", help="the model before alignment")
    parser.add_argument(
        "--aligned", required=True, metavar="DIR_OR_HUB_ID", help="the aligned model, which will be served"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the projector cache")
    parser.add_argument(
        "--modules",
        nargs="+",
        default=[],
        metavar="NAME",
        help="linear layers by name or its last part, e.g. q_proj v_proj; default: all",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        metavar="DTYPE",
        help="of the projectors: float32, bfloat16 (default) or float16",
    )
    parser.add_argument(
        "--form",
        default="auto",
        metavar="FORM",
        help="of the projectors: dense, factored, or auto (default), the smaller of both",
    )
    parser.add_argument("--device", default="cpu", help="where to compute; default: cpu")
    parser.add_argument(
        "--max-energy",
        type=float,
        default=0.95,
        metavar="E",
        help="largest --energy that the cache can serve; default: 0.95",
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
