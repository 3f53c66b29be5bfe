"""``safelora-vllm build``: the projector cache of a model pair."""

from __future__ import annotations

import argparse

from safelora_vllm.cli import DONE

MODEL = "its folder, hub id, or s3://, gs://, az:// or https:// address"
_ADVICE = (
    "Was the base model only pretrained? Then the default policy may bring back few refusals: "
    "docs/policies.md says what to set instead"
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser(
        "build", allow_abbrev=False, help="build the projector cache of a model pair"
    )
    parser.add_argument("--base", required=True, metavar="MODEL", help=f"the model before alignment: {MODEL}")
    parser.add_argument(
        "--aligned", required=True, metavar="MODEL", help="the aligned model, which will be served: the same"
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
        metavar="DTYPE",
        help="with --exact: of Ĉ or V: float32, bfloat16 or float16; default: bfloat16",
    )
    parser.add_argument(
        "--form",
        metavar="FORM",
        help="with --exact: dense (Ĉ), factored (V), or auto, the smaller of both; default: auto",
    )
    parser.add_argument("--device", default="cpu", help="where to compute; default: cpu")
    parser.add_argument(
        "--max-energy",
        type=float,
        metavar="E",
        help="largest --energy that the cache can serve; default: 0.4, with --exact 0.95",
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="keep Ĉ or V too, so that --method safe-lora, --select threshold and --select number do exactly "
        "what the paper says. Without them these policies project more",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build the cache and say where it is."""
    from safelora_vllm.api import build_projectors
    from safelora_vllm.projectors.build import BuildOptions

    options = {name: getattr(args, name) for name in ("dtype", "form", "max_energy")}
    given = {name: value for name, value in options.items() if value is not None}
    BuildOptions(exact=args.exact).check_effective(given)
    cache = build_projectors(
        args.base,
        args.aligned,
        args.out,
        modules=args.modules,
        device=args.device,
        exact=args.exact,
        **given,
    )
    print(_ADVICE)
    print(f"projector cache written to {cache.folder}")
    return DONE
