"""``safelora-vllm serve``: vLLM's OpenAI server, guarded."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

from safelora_vllm.cli import DONE
from safelora_vllm.cli.options import (
    add_policy_options,
    add_projectors_option,
    chosen_policy,
    policy_values,
    route_access,
    size,
    size_text,
)
from safelora_vllm.errors import UsageError
from safelora_vllm.settings import (
    ADMIN_KEY,
    EXAMS,
    FIELDS,
    METRICS_KEY,
    TENANT_REPORTS,
    WORKER,
    ServerSettings,
)
from safelora_vllm.store.layout import DEFAULT_ROOT

_NEEDED = ("vllm", "fastapi")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of ``safelora-vllm``."""
    parser = commands.add_parser(
        "serve",
        help="start vLLM's OpenAI server, guarded; takes every vLLM option too",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="the aligned model: folder or hub id")
    # Each option is the setting of its name, or of its `dest`.
    parser.add_argument(
        "--adapter-store",
        dest="store",
        type=_absolute,
        metavar="DIR",
        help=f"folder for uploads, published copies, names and the audit log; default: {DEFAULT_ROOT}",
    )
    parser.add_argument(
        "--store-mirror",
        metavar="URL",
        help="bucket, such as s3://bucket/prefix, whose names and uploads stores share; default: none",
    )
    parser.add_argument(
        "--admin-api-key",
        metavar="KEY",
        help=f"key for managing adapters; prefer {ADMIN_KEY}, since ps shows options; default: a random key, "
        "printed at start",
    )
    parser.add_argument(
        "--metrics-key",
        metavar="KEY",
        help=f"key for /metrics; prefer {METRICS_KEY}; default: /metrics needs no key",
    )
    parser.add_argument("--keys", type=_absolute, metavar="FILE", help="TOML file with admin and tenant keys")
    parser.add_argument(
        "--adapter-root",
        dest="adapter_roots",
        action="append",
        type=_absolute,
        metavar="DIR",
        help="folder that loads by path may read; may be given several times",
    )
    parser.add_argument(
        "--remote-source",
        dest="remote_sources",
        action="append",
        metavar="PREFIX",
        help="s3://, gs://, az:// or https:// prefix that an admin's loads may read; several times",
    )
    parser.add_argument(
        "--remote-endpoint",
        dest="remote_endpoints",
        action="append",
        metavar="ORIGIN",
        help="http://HOST:PORT or https://HOST:PORT that remote sources may be read from although its "
        "address is private; may be given several times",
    )
    parser.add_argument(
        "--max-adapter-bytes",
        type=size,
        metavar="N",
        help=f"largest file of an adapter; default: {size_text(ServerSettings.max_adapter_bytes)}",
    )
    parser.add_argument(
        "--store-bytes", type=size, metavar="N", help="most bytes of published copies; default: no bound"
    )
    parser.add_argument(
        "--gate-device",
        metavar="D",
        help=f"where the gate projects: {WORKER}, cpu, or a device such as cuda:1; "
        f"default: {ServerSettings.gate_device}",
    )
    parser.add_argument(
        "--projector-memory",
        type=size,
        metavar="N",
        help="most bytes of the gate's device for projectors and the work of an adapter; default: what the "
        "policy takes in all",
    )
    parser.add_argument(
        "--projector-host-memory",
        type=size,
        metavar="N",
        help="most bytes of pinned host memory for what --projector-memory has no room for; default: 0",
    )
    parser.add_argument(
        "--concurrent-uploads",
        type=int,
        metavar="N",
        help=f"uploads at once per API server; default: {ServerSettings.concurrent_uploads}",
    )
    parser.add_argument(
        "--allow-hub", action="store_true", help="let uploads and load_lora_adapter name a hub repository"
    )
    parser.add_argument(
        "--admin-socket",
        type=os.path.abspath,
        metavar="PATH",
        help="Unix socket for callers that cannot send a key; whoever may connect to it is an admin",
    )
    parser.add_argument(
        "--private-docs",
        action="store_true",
        help="let /openapi.json, /docs and /redoc need a key, any of them",
    )
    parser.add_argument("--no-page", action="store_true", help="serve no page at /safelora/")
    parser.add_argument(
        "--tenant-reports",
        choices=TENANT_REPORTS,
        help="whether callers other than admins are told the figures of each module; default: "
        f"{ServerSettings.tenant_reports}",
    )
    parser.add_argument(
        "--route-access",
        action="append",
        type=route_access,
        metavar="'METHOD /path=WHO'",
        help="who may call a route of another plugin: anybody, users or tenants; default: admins",
    )
    parser.add_argument(
        "--trust-served-model",
        action="store_true",
        help="do not compare the served model with the cache's aligned model: it is a copy of it in a form "
        "that cannot be compared",
    )
    parser.add_argument(
        "--audit-stdout",
        action="store_true",
        help="print each record of the audit log to standard output too, as a line of JSON",
    )
    parser.add_argument(
        "--exam",
        choices=EXAMS,
        help="ask each adapter what the aligned model refuses: report serves it whatever comes out, enforce "
        f"serves what has passed; default: {ServerSettings.exam}",
    )
    parser.add_argument(
        "--exam-threshold",
        type=float,
        metavar="NATS",
        help="largest loyalty drop that passes, in nats per token, with its confidence bound; default: "
        f"{ServerSettings.exam_threshold:g}",
    )
    parser.add_argument(
        "--ladder",
        metavar="RUNGS",
        help="with --exam enforce: policies, mildest first; default: those of the command exam that the "
        "projector cache can serve",
    )
    parser.add_argument(
        "--exam-probes",
        type=_absolute,
        metavar="FILE",
        help='JSON lines with a "prompt" that the aligned model refuses; default: built-in ones',
    )
    parser.add_argument(
        "--exam-languages",
        metavar="CODES",
        help="of the built-in probes: some of en,de,es,fr, in which the aligned model refuses; default: "
        f"{ServerSettings.exam_languages}",
    )
    parser.add_argument(
        "--exam-every",
        metavar="TIME",
        help="examine what is served again after 90s, 15m, 24h or 7d, and with --exam enforce withdraw what "
        "fails",
    )
    parser.add_argument(
        "--second-opinion",
        type=int,
        metavar="TOKENS",
        help="ask the aligned model too, for so many tokens, and serve its refusal in the adapter's place, "
        "such as 16; default: it is not asked",
    )
    parser.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="json: vLLM and safelora log one JSON object a line, with the request's id and tenant; "
        "default: text",
    )
    add_projectors_option(parser)
    add_policy_options(parser)
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
    given |= {"projectors": _absolute(args.projectors), "policy": policy_values(args)}
    return ServerSettings(**{**given, "route_access": dict(given.get("route_access", {}))})


def _absolute(path: str) -> str:
    """A path that means the same in every process; an empty one is none."""
    return path and str(Path(path).resolve())


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
