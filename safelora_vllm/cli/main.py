"""The ``safelora-vllm`` command.

Exit codes: 0 done, 1 problems were found, 2 wrong usage or missing input, 3 refused.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys

from safelora_vllm import __version__
from safelora_vllm.cli import (
    REFUSED,
    USAGE,
    audit,
    build,
    calibrate,
    exam,
    inspect,
    plan,
    project,
    serve,
    statement,
    store,
    top,
)
from safelora_vllm.cli.options import as_options
from safelora_vllm.errors import AdapterRefused, SafeLoRAError

_DESCRIPTION = "Serve LoRA adapters with vLLM, and keep what alignment changed in the model."
_EXIT_CODES = (
    "Exit codes: 0 done, 1 problems found (store verify) or an adapter failed (project --all), 2 wrong usage "
    "or missing input, 3 adapter refused."
)
_COMMANDS = (build, inspect, project, serve, plan, calibrate, exam, store, audit, statement, top)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.vllm_options, args.words = rest, sys.argv[1:] if arguments is None else arguments
    try:
        return int(args.run(args))
    except AdapterRefused as error:
        print(f"refused: {as_options(str(error))}", file=sys.stderr)
        return REFUSED
    except SafeLoRAError as error:
        print(f"safelora-vllm: {as_options(str(error))}", file=sys.stderr)
        return USAGE
    except OSError as error:  # a path that is too long, or another user's
        if args.command == "serve":  # vLLM's own
            raise
        print(f"safelora-vllm: {error}", file=sys.stderr)
        return USAGE


class _AsOptions(logging.Formatter):
    """Warnings of the API, in the words of the command line."""

    def format(self, record: logging.LogRecord) -> str:
        return as_options(super().format(record))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="safelora-vllm", description=_DESCRIPTION, epilog=_EXIT_CODES, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


def entry() -> None:
    """The console script."""
    handler = logging.StreamHandler()
    handler.setFormatter(_AsOptions("%(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    if "serve" not in sys.argv[1:2]:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when piped into `head`
    sys.exit(main())


if __name__ == "__main__":
    entry()
