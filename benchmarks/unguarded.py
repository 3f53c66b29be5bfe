"""vLLM's own ``serve`` command. The CPU build installs no ``vllm`` script; this is what that script does."""

from __future__ import annotations

import sys

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main(options: list[str]) -> None:
    """Serve until the process is told to end."""
    parser = FlexibleArgumentParser(prog="vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True))
    args = parser.parse_args(["serve", *options])
    command.validate(args)
    command.cmd(args)


if __name__ == "__main__":
    main(sys.argv[1:])
