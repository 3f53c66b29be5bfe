"""Every place where this package holds on to vLLM's internals, checked before it is used.

| seam | target | why | can go when |
|---|---|---|---|
| manager | ``lora_model_runner_mixin.LRUCacheWorkerLoRAManager`` | every runner builds its LoRA manager from this name | vLLM lets plugins choose the manager |
| load | ``WorkerLoRAManager._load_adapter`` | every real load passes here; unguarded managers refuse | the same |
| step | ``WorkerLoRAManager.set_active_adapters`` | tells a load in the step loop, where an error ends the engine, from one by request | vLLM fails the request instead |
| zeros | ``LoRAModelManager.create_dummy_lora`` | what a running request gets whose adapter cannot be re-read | the same |
| attest | a method on ``WorkerBase`` | the API side asks each worker whether it is guarded | vLLM has a plugin RPC |
| all engines | ``engine_core.call_utility_all_async`` | ``collective_rpc`` gives the first data-parallel engine's answer only | it gives all |
| in flight | ``output_processor.request_states`` | weights are freed when their last request ended | ``remove_lora`` waits itself |
"""  # noqa: E501  (a table's row is one line)

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable
from typing import Any

import vllm
from vllm.lora import worker_manager
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.v1.worker import lora_model_runner_mixin
from vllm.v1.worker.worker_base import WorkerBase

from safelora_vllm.errors import GuardError

OLDEST, NEWEST = (0, 28), (0, 32)
ALLOW_UNTESTED = "SAFELORA_ALLOW_UNTESTED_VLLM"
ATTEST = "safelora_attest"

_original_load: Callable[[Any, LoRARequest], LoRAModel] | None = None


def check_version(version: str) -> None:
    """Refuse a vLLM that this release was not written for.

    Raises:
        GuardError: outside of the range, and ``SAFELORA_ALLOW_UNTESTED_VLLM`` is not 1.
    """
    try:
        found = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        found = (0, 0)
    if not OLDEST <= found <= NEWEST and os.environ.get(ALLOW_UNTESTED) != "1":
        raise GuardError(
            f"vLLM {version} is outside of the range {OLDEST} to {NEWEST} that this release of "
            f"safelora-vllm guards. Install one of those, or set {ALLOW_UNTESTED}=1 to try"
        )


def check_seams() -> None:
    """Compare what is here with what the guard needs.

    Raises:
        GuardError: names the seam that changed.
    """
    base, cached = worker_manager.WorkerLoRAManager, worker_manager.LRUCacheWorkerLoRAManager
    expected = {
        "WorkerLoRAManager._load_adapter": (base._load_adapter, ["self", "lora_request"]),
        "WorkerLoRAManager.set_active_adapters": (
            base.set_active_adapters,
            ["self", "requests", "mapping"],
        ),
    }
    for name, (function, parameters) in expected.items():
        if list(inspect.signature(function).parameters) != parameters:
            raise GuardError(f"vLLM {vllm.__version__}: {name} takes other arguments; not guarded")
    if "_load_adapter" in vars(cached) or "set_active_adapters" in vars(cached):
        raise GuardError(f"vLLM {vllm.__version__}: LRUCacheWorkerLoRAManager loads on its own way")
    if lora_model_runner_mixin.LRUCacheWorkerLoRAManager is not cached:
        raise GuardError("another plugin has replaced vLLM's LoRA manager; not guarded")


def install(manager: type, attest: Callable[[Any], dict[str, Any]]) -> None:
    """Put the guarded manager into this process; the second call does nothing."""
    global _original_load
    if _original_load is not None:
        return
    check_version(vllm.__version__)
    check_seams()
    _original_load = worker_manager.WorkerLoRAManager._load_adapter
    worker_manager.WorkerLoRAManager._load_adapter = _refuse_unguarded
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = manager
    setattr(WorkerBase, ATTEST, attest)


def _refuse_unguarded(self: Any, lora_request: LoRARequest) -> LoRAModel:
    raise GuardError(
        f"{type(self).__name__} is not guarded by safelora, so {lora_request.lora_name} is not loaded"
    )


def load_published(manager: Any, request: LoRARequest) -> LoRAModel:
    """vLLM's own load of a folder; for guarded managers only."""
    assert _original_load is not None, "the guard is not installed"
    return _original_load(manager, request)


def no_adapter(manager: Any, request: LoRARequest) -> LoRAModel:
    """An adapter of zeros, as vLLM makes it to warm up: its requests get the aligned model."""
    inner = manager._adapter_manager
    rank = inner.get_dummy_lora_warmup_rank(1) if hasattr(inner, "get_dummy_lora_warmup_rank") else 1
    return inner.create_dummy_lora(request.lora_int_id, rank, manager.embedding_modules)


async def ask_all_workers(engine_client: Any) -> list[dict[str, Any]]:
    """The attestations of all workers of all data-parallel engines."""
    core = engine_client.engine_core
    arguments = ("collective_rpc", ATTEST, None, (), None)
    if hasattr(core, "call_utility_all_async"):
        per_engine = await core.call_utility_all_async(*arguments)
    elif hasattr(core, "core_engines") and hasattr(core, "_call_utility_async"):
        per_engine = await asyncio.gather(
            *[core._call_utility_async(*arguments, engine=engine) for engine in core.core_engines]
        )
    else:
        per_engine = [await engine_client.collective_rpc(ATTEST)]
    return [answer for workers in per_engine for answer in workers]


def in_flight(engine_client: Any, request: LoRARequest) -> int:
    """Requests of this API server that still generate with an adapter's weights."""
    states = engine_client.output_processor.request_states.values()
    return sum(
        getattr(getattr(state, "lora_request", None), "lora_int_id", None) == request.lora_int_id
        for state in states
    )
