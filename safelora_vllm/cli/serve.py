"""``safelora-vllm serve``: vLLM's OpenAI server, guarded."""

from __future__ import annotations

import argparse
import importlib.util
import os

from safelora_vllm.cli import DONE
from safelora_vllm.cli.options import (
    add_policy_options,
    add_projectors_option,
    chosen_policy,
    policy_values,
)
from safelora_vllm.cli.serve_options import absolute, add_server_options
from safelora_vllm.errors import UsageError
from safelora_vllm.settings import ADMIN_KEY, FIELDS, METRICS_KEY, ServerSettings

_NEEDED = ("vllm", "fastapi")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser(
        "serve",
        usage="%(prog)s MODEL --projectors DIR [OPTIONS] [OPTIONS OF VLLM]",
        help="start vLLM's OpenAI server, guarded; takes every vLLM option too",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="the aligned model: folder or hub id")
    add_projectors_option(parser)
    add_policy_options(parser)
    add_server_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check what can be checked at once, then serve until the server ends."""
    _check_model(args)
    chosen_policy(args)
    _check_installed()
    from safelora_vllm.integration.launch import serve

    for name, key in ((ADMIN_KEY, args.admin_api_key), (METRICS_KEY, args.metrics_key)):
        if key:
            os.environ[name] = key
    if args.log_format == "json":
        _log_json()
    serve(args.model, _settings(args), args.vllm_options)
    return DONE


def _check_model(args: argparse.Namespace) -> None:
    """Raises UsageError where the model may be the value of a vLLM option: only vLLM knows which have one."""
    before = args.words[args.words.index(args.model, 1) - 1]  # after the command itself
    if before in args.vllm_options and "=" not in before:
        raise UsageError(
            f"{args.model!r} follows vLLM's option {before} and may be its value: expected the model right "
            "after the command, safelora-vllm serve MODEL --projectors DIR"
        )


def _log_json() -> None:
    """For this process and all that it starts.

    Raises:
        UsageError: the variable names another configuration.
    """
    from safelora_vllm.integration.json_logs import CONFIG, VARIABLE

    if os.environ.get(VARIABLE, str(CONFIG)) != str(CONFIG):
        raise UsageError(f"--log-format json is {VARIABLE}={CONFIG}, but it names another file: unset it")
    os.environ[VARIABLE] = str(CONFIG)


def _settings(args: argparse.Namespace) -> ServerSettings:
    """The settings whose options were given; the others have their defaults.

    Raises:
        UsageError: an option without effect, even at its default. GuardError: other values that are wrong.
    """
    if args.exam_threshold is not None and args.exam in (None, "off"):
        raise UsageError(
            "--exam-threshold has no effect without --exam: leave it out, or add --exam report or --exam "
            "enforce"
        )
    given = {name: value for name in FIELDS if (value := getattr(args, name, None)) not in (None, "")}
    given |= {"projectors": absolute(args.projectors), "policy": policy_values(args)}
    return ServerSettings(**{**given, "route_access": dict(given.get("route_access", {}))})


def _check_installed() -> None:
    """Raises UsageError where the base install is all there is."""
    if missing := [name for name in _NEEDED if not _installed(name)]:
        raise UsageError(
            f"serve needs {' and '.join(missing)}: install them with pip install '.[vllm]' in the "
            "checkout, or '.[cpu]' on a machine without a GPU"
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
