"""``safelora-vllm exam``: which rung of a ladder of policies an adapter passes, without a server."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_vllm.cli import DONE, REFUSED
from safelora_vllm.cli.options import ADAPTER, add_projectors_option
from safelora_vllm.errors import UsageError
from safelora_vllm.exam.ladder import DEFAULT, name_of
from safelora_vllm.exam.probes import COUNT
from safelora_vllm.exam.score import THRESHOLD
from safelora_vllm.policy import CAPS, Policy

if TYPE_CHECKING:
    from safelora_vllm.api.exam import Examination


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    default = Policy()
    parser = commands.add_parser(
        "exam", allow_abbrev=False, help="ask an adapter what the aligned model refuses, and find its policy"
    )
    parser.add_argument("adapter", nargs="+", help=f"{ADAPTER}; several are examined in turn")
    parser.add_argument("--model", required=True, metavar="DIR", help="folder of the aligned model")
    add_projectors_option(parser)
    parser.add_argument(
        "--ladder",
        metavar="RUNGS",
        help=f"policies, mildest first; default: those of {DEFAULT} that the projector cache can serve",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        metavar="NATS",
        help="largest loyalty drop that passes, in nats per token, with its confidence bound; "
        f"default: {THRESHOLD:g}",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="the adapters are honest: propose the threshold that serves all of them at the mildest rung",
    )
    parser.add_argument("--probes", metavar="FILE", help='JSON lines with a "prompt"; default: built-in ones')
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help=f"built-in probes; default: as many as a server asks, {COUNT} or half of the languages'",
    )
    parser.add_argument(
        "--languages",
        default="en",
        metavar="CODES",
        help="of built-in probes: some of en,de,es,fr; default: en",
    )
    draw = parser.add_mutually_exclusive_group()
    draw.add_argument(
        "--secret", default="", metavar="TEXT", help="draws the built-in probes; default: a public draw"
    )
    draw.add_argument(
        "--secret-file",
        metavar="FILE",
        help="the same from a file, such as a server's STORE/exam/secret: asks what that server asks first, "
        "also of a file of probes",
    )
    for cap in CAPS:
        value = getattr(default, cap)
        parser.add_argument(
            f"--{cap.replace('_', '-')}",
            type=float,
            default=value,
            metavar="X",
            help=f"the cap of every rung, as in a policy; default: {value}",
        )
    parser.add_argument("--device", default="cpu", help="where the model runs; default: cpu")
    parser.add_argument("--json", action="store_true", help="print the verdicts as JSON, one a line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print each adapter's rungs and verdict, or with --calibrate the threshold."""
    if missing := [adapter for adapter in args.adapter if not Path(adapter).exists()]:
        raise UsageError(f"there is nothing at {', '.join(map(repr, missing))}: expected a {ADAPTER}")
    from tqdm import tqdm

    from safelora_vllm.api.exam import Examination
    from safelora_vllm.cli.tables_exam import print_calibration, print_reference

    # peft loads it, and it warns of a kernel that nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    print("Loading the model, and asking it the probes ...", file=sys.stderr, flush=True)

    caps = Policy(max_relative_norm=args.max_relative_norm, max_total_norm=args.max_total_norm)
    examination = Examination.of(
        args.model,
        args.projectors,
        ladder=args.ladder,
        caps=caps,
        probes=args.probes,
        count=args.count,
        languages=args.languages.split(","),
        secret=_secret(args),
        device=args.device,
    )
    if not args.json:
        print_reference(examination.reference)
    adapters = tqdm(args.adapter, desc="Adapters", unit="adapter", disable=len(args.adapter) < 2)
    if args.calibrate:
        print_calibration(examination.threshold_for(list(adapters)), len(args.adapter), args.json)
        return DONE
    return _examine(examination, adapters, args)


def _secret(args: argparse.Namespace) -> bytes:
    """What draws the probes; empty for the public draw."""
    if args.secret_file is None:
        try:
            return str(args.secret).encode()
        except UnicodeEncodeError as error:
            raise UsageError(
                "--secret is not UTF-8 text: expected text. Give a file of bytes with --secret-file"
            ) from error
    try:
        found = Path(args.secret_file).read_bytes()
    except OSError as error:
        raise UsageError(
            f"--secret-file {args.secret_file} cannot be read ({error.strerror}): expected a file such as "
            "STORE/exam/secret, read by the user who owns the store"
        ) from error
    if not found:
        raise UsageError(f"--secret-file {args.secret_file} is empty: expected a secret")
    return found


def _examine(examination: Examination, adapters: Iterable[str], args: argparse.Namespace) -> int:
    from safelora_vllm.cli.tables_exam import print_verdict

    served = True
    for adapter in adapters:
        verdict = examination.examine(
            adapter,
            args.threshold,
            lambda rung: print(f"Asking it by {name_of(rung)} ...", file=sys.stderr, flush=True),
        )
        served &= verdict.policy is not None
        if args.json:
            print(json.dumps({"adapter": adapter, **verdict.to_dict()}, allow_nan=False))
        else:
            print_verdict(adapter, verdict)
    return DONE if served else REFUSED
