"""``safelora-vllm serve``: vLLM's own OpenAI server with the guard in place, in one command."""

from __future__ import annotations

import argparse
import json
import os
import socket
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from safelora_vllm.errors import GuardError, UsageError
from safelora_vllm.exam import ladder
from safelora_vllm.gate.socket_folder import remove_leftovers
from safelora_vllm.integration import runtime_updating
from safelora_vllm.integration.seams import checks, kv_connectors
from safelora_vllm.integration.server.access_check import granted
from safelora_vllm.methods.reads import check_energy
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import at_revision
from safelora_vllm.served_model import check_served_model
from safelora_vllm.settings import (
    ADMIN_KEY,
    METRICS_KEY,
    PLUGIN,
    TOWER_LORA,
    WEIGHT_TRANSFER,
    ServerSettings,
    new_admin_key,
)
from safelora_vllm.store.housekeeping import check_store
from safelora_vllm.store.mirror import check_mirror
from safelora_vllm.store.names import NameStore
from safelora_vllm.tenants.keyless import check_keyless
from safelora_vllm.tenants.keys import KeyRing
from safelora_vllm.tenants.rules_check import tenant_check

REQUIRED = "safelora_vllm.integration.required.Guard"
_DEFAULT_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


def serve(model: str, settings: ServerSettings, vllm_options: list[str]) -> None:
    """Check what can be checked at once, then hand over to vLLM's serve command.

    Raises:
        UsageError: vLLM is not installed, its options are not what it takes, its port is in use, or access to
        a route that cannot be given.
        ProjectorCacheError: no cache, or one for another model. KeysError: a wrong keys file.
        PolicyError: more than the cache has.
        GuardError: a vLLM that is not guarded, or a store of another bucket. StoreUnavailable: the bucket.
    """
    cache = ProjectorCache(settings.projectors)
    if not settings.trust_served_model:
        check_served_model(cache, at_revision(model, _revision(vllm_options)), quick=True)
    _check_rules(cache, settings)
    granted(settings.route_access)
    _check_keys(settings)
    os.environ["VLLM_PLUGINS"] = allowed_plugins()
    runtime_updating.switch_off()
    try:
        import vllm  # noqa: F401  (an old or new one shall be called that, not broken)
    except ImportError as error:
        raise UsageError(
            f"vLLM cannot be imported ({error}); install it with pip install '.[vllm]' in "
            "the checkout, or '.[cpu]' on a machine without a GPU"
        ) from error
    checks.check("command")
    checks.check("server")
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="safelora-vllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(required=True))
    args = parser.parse_args(["serve", model, *guarded_options(settings, vllm_options)])
    _refuse_options(args)
    _check_address(args)
    _bound_cpu_memory(args)
    command.validate(args)
    try:
        command.cmd(args)
    finally:
        remove_leftovers()


def allowed_plugins() -> str:
    """``VLLM_PLUGINS`` with safelora in it.

    vLLM loads endpoint plugins only when they are named, and then loads nothing else that is not
    named. So the plugins that it would have loaded by itself are named too.
    """
    named = os.environ.get("VLLM_PLUGINS")
    if named is not None:
        others = [name for name in named.split(",") if name]
    else:
        others = [entry.name for group in _DEFAULT_GROUPS for entry in entry_points(group=group)]
    return ",".join(dict.fromkeys([PLUGIN, *others]))


def _revision(options: list[str]) -> str | None:
    """vLLM's ``--revision``, before vLLM is there to read it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--revision")
    found: str | None = parser.parse_known_args(options)[0].revision
    return found


def guarded_options(settings: ServerSettings, options: list[str]) -> list[str]:
    """vLLM's options with the guard's added; an ``--additional-config`` of the user is kept."""
    additional, rest = _take_additional_config(options)
    additional.update(settings.to_section())
    guarded = [*rest, "--additional-config", json.dumps(additional)]
    if "--enable-lora" not in rest:
        guarded.append("--enable-lora")
    if not any(option.split("=")[0].replace("_", "-") == "--worker-extension-cls" for option in rest):
        guarded += ["--worker-extension-cls", REQUIRED]
    return guarded


def _check_rules(cache: ProjectorCache, settings: ServerSettings) -> None:
    """What the gate and the workers would refuse too, but minutes later and in the middle of a long log.

    Raises:
        PolicyError: more than the cache has. GuardError: the store opens a way around, mirrors another
        bucket, or has adapters of tenants, and there is no keys file. StoreUnavailable: a bucket that is
        new to the store does not answer.
    """
    policy = Policy.from_mapping(settings.policy)
    check_energy(policy, cache)
    if settings.exam == "enforce":
        ladder.usable(cache, settings.ladder, policy)
    check_store(settings.store)
    check_mirror(settings.store, settings.store_mirror)
    if not settings.keys:
        check_keyless(settings.store, NameStore(settings.store).all().values())


def _check_keys(settings: ServerSettings) -> None:
    """Read the keys that the server will have, and make an admin key where nobody gave one.

    Raises:
        KeysError: one is wrong.
    """
    admin, metrics = os.environ.get(ADMIN_KEY), os.environ.get(METRICS_KEY)
    check = tenant_check(settings.policy, settings.projectors, settings.exam_given) if settings.keys else None
    ring = KeyRing.open(Path(settings.keys) if settings.keys else None, admin, [], metrics, check)
    if settings.keys and not ring.has_admin:
        print(f"safelora: no admin key, neither in {settings.keys} nor in {ADMIN_KEY}", flush=True)
    elif not settings.keys and not admin:  # one for all API server processes, which inherit it
        os.environ[ADMIN_KEY] = new_admin_key()


def _refuse_options(args: argparse.Namespace) -> None:
    """Front ends without our routes and keys, new weights, caches that mix adapters up, no LoRA.

    On the command line or in ``--config``.

    Raises:
        GuardError: one is asked for.
    """
    if getattr(args, "weight_transfer_config", None):
        raise GuardError(WEIGHT_TRANSFER)
    if getattr(args, "enable_tower_connector_lora", False):
        raise GuardError(TOWER_LORA)
    kv_connectors.check(getattr(args, "kv_transfer_config", None))
    if getattr(args, "kv_offloading_size", None) and args.kv_offloading_backend == "lmcache":
        kv_connectors.check({"kv_connector": "LMCacheMPConnector"})  # as vLLM understands it
    if not args.enable_lora:
        raise GuardError("--no-enable-lora leaves nothing to guard; leave it out, or start plain vLLM")
    rust = os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0"
    if named := "--grpc" if getattr(args, "grpc", False) else "VLLM_USE_RUST_FRONTEND" if rust else "":
        raise GuardError(
            f"{named} starts a front end that loads no plugins, so that nobody is told apart; leave it out"
        )


def _check_address(args: argparse.Namespace) -> None:
    """Raises UsageError where vLLM could not listen, which it says by a traceback."""
    if getattr(args, "uds", None) or getattr(args, "headless", False):
        return
    host = args.host or ""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        try:
            trial.bind((host, args.port))
        except OSError as error:
            raise UsageError(
                f"cannot listen on port {args.port} of {host or 'all addresses'} ({error.strerror}): stop "
                "what listens there, or give another --port or --host"
            ) from error


def _bound_cpu_memory(args: argparse.Namespace) -> None:
    """A KV cache of a few GiB for servers on a CPU whose user set no size.

    vLLM would take 92 % of all memory, or not start where less is free: "Available memory ... is less than
    desired CPU memory utilization" (``vllm/v1/worker/cpu_worker.py``).
    """
    import psutil  # type: ignore[import-untyped]  # a requirement of vLLM, which is not type-checked
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and _takes_most_memory(args, EngineArgs.gpu_memory_utilization):
        args.kv_cache_memory_bytes = cpu_kv_cache_bytes(psutil.virtual_memory().available)
        print(
            f"safelora: the KV cache of each worker takes {args.kv_cache_memory_bytes / 2**30:.1f} GiB of "
            "memory. --kv-cache-memory-bytes sets another size; vLLM's own default is most of the memory",
            flush=True,
        )


def _takes_most_memory(args: argparse.Namespace, default: float) -> bool:
    """Whether nobody said how much memory the server takes. default: vLLM's share."""
    return (
        not os.environ.get("VLLM_CPU_KVCACHE_SPACE")
        and args.kv_cache_memory_bytes is None
        and args.gpu_memory_utilization == default
    )


def cpu_kv_cache_bytes(available: int) -> int:
    """4 GiB, or a quarter of the memory that is available where that is less."""
    return min(4 * 2**30, available // 4)


def _take_additional_config(options: list[str]) -> tuple[dict[str, Any], list[str]]:
    found: dict[str, Any] = {}
    rest: list[str] = []
    waiting = iter(options)
    for option in waiting:
        flag, equals, value = option.partition("=")
        if flag.replace("_", "-") != "--additional-config":
            rest.append(option)
            continue
        text = value if equals else next(waiting, "")
        try:
            found.update(json.loads(text))
        except (ValueError, TypeError) as error:
            raise UsageError(f"--additional-config is not a JSON object: {error}") from error
    return found, rest
