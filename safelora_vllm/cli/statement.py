"""``safelora-vllm statement``: the gate's decision about an adapter, signed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from safelora_vllm.cli.options import STORE
from safelora_vllm.errors import UsageError
from safelora_vllm.files import is_digest
from safelora_vllm.store.layout import default_root

_MOST = 64 * 1024  # bytes of a key
_HOW = (
    "verify it with the public key ('openssl pkey -in KEY -pubout'): the signature is ECDSA with SHA-256 "
    "over the DSSE encoding of payloadType and payload. docs/signatures.md has a script"
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser(
        "statement",
        allow_abbrev=False,
        help="print the decision about an adapter that is served as a signed statement",
    )
    parser.add_argument("name", metavar="NAME", help="of the adapter, e.g. acme/support")
    parser.add_argument("--adapter-store", metavar="DIR", help=STORE)
    parser.add_argument(
        "--key", required=True, metavar="FILE", help="that signs: a private key of the curve P-256 in PEM"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--of-version",
        type=int,
        metavar="N",
        help="the decision about this version; default: about the one that is served",
    )
    which.add_argument(
        "--digest", type=_digest, help="the newest decision about this content, refused attempts too"
    )
    parser.set_defaults(run=run)


def _digest(text: str) -> str:
    if not is_digest(text):
        raise argparse.ArgumentTypeError(
            f"{text!r:.80} is not a valid digest: expected 64 hex digits, as in 'safelora-vllm audit --json'"
        )
    return text


def run(args: argparse.Namespace) -> int:
    """Print the envelope, and on standard error how to verify it. Exit code 0."""
    from safelora_vllm.store.statement import signed_statement

    root = Path(args.adapter_store) if args.adapter_store else default_root()
    try:
        with Path(args.key).open("rb") as file:
            key = file.read(_MOST)
        envelope = signed_statement(root, args.name, key, args.of_version, args.digest)
    except OSError as error:
        raise UsageError(
            f"{error.filename} cannot be read ({error.strerror}): fix its path or permissions"
        ) from error
    print(json.dumps(envelope, indent=1))
    print(_HOW, file=sys.stderr)
    return 0
