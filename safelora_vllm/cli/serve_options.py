"""The options of ``safelora-vllm serve`` that are not a policy's: each is the setting of its name."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from safelora_vllm.cli.options import route_access, size, size_text
from safelora_vllm.settings import ADMIN_KEY, EXAMS, METRICS_KEY, TENANT_REPORTS, WORKER, ServerSettings
from safelora_vllm.store.layout import DEFAULT_ROOT


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Add them by subject, as ``--help`` shows them. An option's ``dest`` is its setting."""
    for title, add in (
        ("adapters and their store", _store),
        ("keys and routes", _access),
        ("the gate", _gate),
        ("the exam and the second opinion", _exam),
        ("logs", _logs),
    ):
        add(parser.add_argument_group(title))


def absolute(path: str) -> str:
    """A path that means the same in every process; an empty one is none."""
    return path and str(Path(path).resolve())


def _store(group: argparse._ArgumentGroup) -> None:
    """Where adapters come from, and where they are kept."""
    group.add_argument(
        "--adapter-store",
        dest="store",
        type=absolute,
        metavar="DIR",
        help=f"folder for uploads, published copies, names and the audit log; default: {DEFAULT_ROOT}",
    )
    group.add_argument(
        "--store-mirror",
        metavar="URL",
        help="bucket, such as s3://bucket/prefix, whose names and uploads stores share; default: none",
    )
    group.add_argument(
        "--store-bytes", type=size, metavar="N", help="most bytes of published copies; default: no bound"
    )
    group.add_argument(
        "--adapter-root",
        dest="adapter_roots",
        action="append",
        type=absolute,
        metavar="DIR",
        help="folder that loads by path may read; may be given several times",
    )
    group.add_argument(
        "--remote-source",
        dest="remote_sources",
        action="append",
        metavar="PREFIX",
        help="s3://, gs://, az:// or https:// prefix that an admin's loads may read; several times",
    )
    group.add_argument(
        "--remote-endpoint",
        dest="remote_endpoints",
        action="append",
        metavar="ORIGIN",
        help="http://HOST:PORT or https://HOST:PORT that remote sources may be read from although its "
        "address is private; may be given several times",
    )
    group.add_argument(
        "--allow-hub", action="store_true", help="let uploads and load_lora_adapter name a hub repository"
    )
    group.add_argument(
        "--max-adapter-bytes",
        type=size,
        metavar="N",
        help=f"largest file of an adapter; default: {size_text(ServerSettings.max_adapter_bytes)}",
    )
    group.add_argument(
        "--concurrent-uploads",
        type=int,
        metavar="N",
        help=f"uploads at once per API server; default: {ServerSettings.concurrent_uploads}",
    )


def _access(group: argparse._ArgumentGroup) -> None:
    """Who may call what."""
    group.add_argument(
        "--admin-api-key",
        metavar="KEY",
        help=f"key for managing adapters; prefer {ADMIN_KEY}, since ps shows options; default: a random key, "
        "printed at start",
    )
    group.add_argument(
        "--metrics-key",
        metavar="KEY",
        help=f"key for /metrics; prefer {METRICS_KEY}; default: /metrics needs no key",
    )
    group.add_argument("--keys", type=absolute, metavar="FILE", help="TOML file with admin and tenant keys")
    group.add_argument(
        "--admin-socket",
        type=os.path.abspath,
        metavar="PATH",
        help="Unix socket for callers that cannot send a key; whoever may connect to it is an admin",
    )
    group.add_argument(
        "--route-access",
        action="append",
        type=route_access,
        metavar="'METHOD /path=WHO'",
        help="who may call a route of another plugin: anybody, users or tenants; default: admins",
    )
    group.add_argument(
        "--tenant-reports",
        choices=TENANT_REPORTS,
        help="whether callers other than admins are told the figures of each module; default: "
        f"{ServerSettings.tenant_reports}",
    )
    group.add_argument(
        "--private-docs",
        action="store_true",
        help="let /openapi.json, /docs and /redoc need a key, any of them",
    )
    group.add_argument("--no-page", action="store_true", help="serve no page at /safelora/")


def _gate(group: argparse._ArgumentGroup) -> None:
    """Where the gate projects, and for which served model."""
    group.add_argument(
        "--gate-device",
        metavar="D",
        help=f"where the gate projects: {WORKER}, cpu, or a device such as cuda:1; "
        f"default: {ServerSettings.gate_device}",
    )
    group.add_argument(
        "--projector-memory",
        type=size,
        metavar="N",
        help="most bytes of the gate's device for projectors and the work of an adapter; default: what the "
        "policy takes in all",
    )
    group.add_argument(
        "--projector-host-memory",
        type=size,
        metavar="N",
        help="most bytes of pinned host memory for what --projector-memory has no room for; default: 0",
    )
    group.add_argument(
        "--trust-served-model",
        action="store_true",
        help="do not compare the served model with the cache's aligned model: it is a copy of it in a form "
        "that cannot be compared",
    )


def _exam(group: argparse._ArgumentGroup) -> None:
    """What models are asked."""
    group.add_argument(
        "--exam",
        choices=EXAMS,
        help="ask each adapter what the aligned model refuses: report serves it whatever comes out, enforce "
        f"serves what has passed; default: {ServerSettings.exam}",
    )
    group.add_argument(
        "--exam-threshold",
        type=float,
        metavar="NATS",
        help="largest loyalty drop that passes, in nats per token, with its confidence bound; default: "
        f"{ServerSettings.exam_threshold:g}",
    )
    group.add_argument(
        "--ladder",
        metavar="RUNGS",
        help="with --exam enforce: policies, mildest first; default: those of the command exam that the "
        "projector cache can serve",
    )
    group.add_argument(
        "--exam-probes",
        type=absolute,
        metavar="FILE",
        help='JSON lines with a "prompt" that the aligned model refuses; default: built-in ones',
    )
    group.add_argument(
        "--exam-languages",
        metavar="CODES",
        help="of the built-in probes: some of en,de,es,fr, in which the aligned model refuses; default: "
        f"{ServerSettings.exam_languages}",
    )
    group.add_argument(
        "--exam-every",
        metavar="TIME",
        help="examine what is served again after 90s, 15m, 24h or 7d, and with --exam enforce withdraw what "
        "fails",
    )
    group.add_argument(
        "--second-opinion",
        type=int,
        metavar="TOKENS",
        help="ask the aligned model too, for so many tokens, and serve its refusal in the adapter's place, "
        "such as 16; default: it is not asked",
    )


def _logs(group: argparse._ArgumentGroup) -> None:
    """What is written where."""
    group.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="json: vLLM and safelora log one JSON object a line, with the request's id and tenant; "
        "default: text",
    )
    group.add_argument(
        "--audit-stdout",
        action="store_true",
        help="print each record of the audit log to standard output too, as a line of JSON",
    )
