"""The ``safelora-vllm`` command. Exit codes: 0 done, 2 wrong usage or missing input, 3 refused."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelora_vllm import __version__
from safelora_vllm.cli import audit, calibrate, store
from safelora_vllm.cli.options import add_policy_options, policy_values, route_access, size, size_text
from safelora_vllm.errors import AdapterRefused, SafeLoRAError, UsageError
from safelora_vllm.settings import ADMIN_KEY, FIELDS, METRICS_KEY, ServerSettings

if TYPE_CHECKING:
    import torch

    from safelora_vllm.gate.admit import GateSettings
    from safelora_vllm.report import Report

REFUSED, USAGE = 3, 2


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command != "serve":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.command == "serve":
            return _serve(args, rest)
        return int(args.run(args))
    except AdapterRefused as error:
        print(f"refused: {error}", file=sys.stderr)
        return REFUSED
    except SafeLoRAError as error:
        print(f"safelora-vllm: {error}", file=sys.stderr)
        return USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="safelora-vllm", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    build = commands.add_parser("build", allow_abbrev=False, help="build the projector cache of a model pair")
    build.add_argument("--base", required=True, metavar="DIR_OR_HUB_ID", help="before alignment")
    build.add_argument("--aligned", required=True, metavar="DIR_OR_HUB_ID", help="the served model")
    build.add_argument("--out", required=True, metavar="DIR")
    build.add_argument("--modules", nargs="+", default=[], help="e.g. q_proj v_proj; default: all linear")
    build.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 (default) or float16")
    build.add_argument("--form", default="auto", help="auto (default), dense or factored")
    build.add_argument("--device", default="cpu", help="where to compute; default: cpu")
    build.add_argument(
        "--max-energy", type=float, default=0.95, help="largest --energy to serve; default: 0.95"
    )
    build.set_defaults(run=_build)

    inspect = commands.add_parser(
        "inspect", allow_abbrev=False, help="show what the gate would do with an adapter"
    )
    inspect.add_argument(
        "adapter", nargs="+", help="a PEFT adapter folder; of several, one line each and their largest norms"
    )
    inspect.add_argument("--json", action="store_true", help="print the report as JSON; several, one a line")
    inspect.set_defaults(run=_inspect)

    project = commands.add_parser(
        "project", allow_abbrev=False, help="pass an adapter through the gate, offline"
    )
    project.add_argument("adapter", help="a PEFT adapter folder")
    project.add_argument("--out", required=True, metavar="DIR", help="folder for the new adapter")
    project.set_defaults(run=_project)

    serve = commands.add_parser(
        "serve",
        help="start vLLM's OpenAI server, guarded; takes every vLLM option too",
        allow_abbrev=False,
    )
    serve.add_argument("model", help="the aligned model: folder or hub id")
    # Each option is the setting of its name, or of its `dest`.
    serve.add_argument(
        "--adapter-store", dest="store", type=_absolute, metavar="DIR", help="where published adapters live"
    )
    serve.add_argument("--admin-api-key", help="or SAFELORA_ADMIN_API_KEY; default: a random one")
    serve.add_argument("--metrics-key", help="or SAFELORA_METRICS_KEY; without one /metrics needs no key")
    serve.add_argument("--keys", type=_absolute, metavar="FILE", help="TOML file with admin and tenant keys")
    serve.add_argument(
        "--adapter-root",
        dest="adapter_roots",
        action="append",
        type=_absolute,
        metavar="DIR",
        help="folder that loads by path may read",
    )
    serve.add_argument(
        "--max-adapter-bytes",
        type=size,
        metavar="N",
        help=f"largest file; default: {size_text(ServerSettings.max_adapter_bytes)}",
    )
    serve.add_argument("--store-bytes", type=size, metavar="N", help="budget of the published copies")
    serve.add_argument(
        "--concurrent-uploads",
        type=int,
        metavar="N",
        help=f"per API server; default: {ServerSettings.concurrent_uploads}",
    )
    serve.add_argument("--allow-hub", action="store_true", help="let uploads name a hub repository")
    serve.add_argument(
        "--private-docs", action="store_true", help="/openapi.json, /docs and /redoc need a key (any)"
    )
    serve.add_argument(
        "--route-access",
        action="append",
        type=route_access,
        metavar="'METHOD /path=WHO'",
        help="who may call a route of another plugin: anybody, users or tenants; default: admins",
    )
    serve.add_argument(
        "--trust-served-model",
        action="store_true",
        help="the served model is a converted copy of the cache's aligned model: do not compare them",
    )
    calibrate.add_parser(commands)
    store.add_parser(commands)
    audit.add_parser(commands)
    for command in (inspect, project, serve):
        command.add_argument("--projectors", required=True, metavar="DIR", help="the projector cache")
        add_policy_options(command)
    for command in (inspect, project):
        command.add_argument("--device", default="cpu", help="where to project; default: cpu")
    return parser


def _build(args: argparse.Namespace) -> int:
    from safelora_vllm.projectors.build import BuildOptions, build

    options = BuildOptions(
        tuple(args.modules), args.dtype, args.form, str(_device(args.device)), args.max_energy
    )
    folder = build(args.base, args.aligned, args.out, options)
    print(f"projector cache written to {folder}")
    return 0


def _gate_settings(args: argparse.Namespace) -> GateSettings:
    """GateSettings from the options; imports torch only now, so that --help is quick."""
    from safelora_vllm.gate.admit import GateSettings
    from safelora_vllm.policy import Policy
    from safelora_vllm.projectors.cache import ProjectorCache

    values = policy_values(args)
    policy = Policy.from_mapping(values)
    policy.check_effective(values)
    return GateSettings(ProjectorCache(args.projectors), policy, _device(args.device))


def _device(name: str) -> torch.device:
    """A device that torch can use here."""
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"torch cannot use the device {name!r} here; try cpu") from error


def _inspect(args: argparse.Namespace) -> int:
    import json

    from tqdm import tqdm

    from safelora_vllm.cli.tables import print_report, print_summary

    settings, several = _gate_settings(args), len(args.adapter) > 1
    reports = [
        _report(folder, settings)
        for folder in tqdm(args.adapter, desc="Adapters", unit="adapter", disable=not several)
    ]
    if args.json and several:
        for report in reports:
            print(json.dumps(report.to_dict(), allow_nan=False))
    elif args.json:
        print(reports[0].to_json())
    elif several:
        print_summary(reports)
    else:
        print_report(reports[0])
    return 0 if all(report.accepted for report in reports) else REFUSED


def _report(folder: str, settings: GateSettings) -> Report:
    """What the gate says about one adapter, also if it cannot be read."""
    from safelora_vllm.adapters.read import read_adapter
    from safelora_vllm.gate.admit import evaluate
    from safelora_vllm.report import Report

    name = Path(folder).resolve().name
    try:
        return evaluate(read_adapter(folder, settings.limits), name, settings)[0]
    except AdapterRefused as error:
        return Report.refused(name, "", settings.cache.id, settings.policy, error)


def _project(args: argparse.Namespace) -> int:
    from safelora_vllm.gate.admit import admit
    from safelora_vllm.store import PublishedStore

    out = Path(args.out)
    if out.exists():
        raise UsageError(f"{out} exists; remove it or give another --out")
    settings = _gate_settings(args)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=out.parent, prefix=".project-")
    except OSError as error:
        raise UsageError(f"{out.parent} cannot be written ({error.strerror}); give another --out") from error
    with folder as scratch:
        admission = admit(args.adapter, Path(args.adapter).resolve().name, settings, PublishedStore(scratch))
        if admission.folder is None:
            raise AdapterRefused(admission.report.reasons)
        shutil.move(admission.folder, out)
    report = admission.report
    share = f"{report.count('projected')} of {len(report.modules)} modules"
    if settings.policy.enforcing:
        print(f"{share} projected, written to {out}")
    else:
        print(f"audit mode: written UNPROJECTED to {out}; enforcing would project {share}")
    return 0


def _serve(args: argparse.Namespace, vllm_options: list[str]) -> int:
    from safelora_vllm.integration.launch import serve
    from safelora_vllm.policy import Policy

    policy = policy_values(args)
    Policy.from_mapping(policy).check_effective(policy)
    for name, key in ((ADMIN_KEY, args.admin_api_key), (METRICS_KEY, args.metrics_key)):
        if key:
            os.environ[name] = key
    serve(args.model, _settings(args, policy), vllm_options)
    return 0


def _settings(args: argparse.Namespace, policy: dict[str, Any]) -> ServerSettings:
    """The settings whose options were given; the others have their defaults."""
    given = {name: value for name in FIELDS if (value := getattr(args, name, None)) not in (None, "")}
    given |= {"projectors": _absolute(args.projectors), "policy": policy}
    return ServerSettings(**{**given, "route_access": dict(given.get("route_access", {}))})


def _absolute(path: str) -> str:
    """A path that means the same in every process; an empty one is none."""
    return path and str(Path(path).resolve())


def entry() -> None:
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.WARNING)
    if "serve" not in sys.argv[1:2]:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when piped into `head`
    sys.exit(main())


if __name__ == "__main__":
    entry()
