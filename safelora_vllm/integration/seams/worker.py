"""Every use of vLLM's internals; what each needs of vLLM stands in `seam_table`."""

from __future__ import annotations

import asyncio
import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from safetensors.torch import load
from torch import Tensor
from vllm import platforms
from vllm.lora import lora_model, worker_manager
from vllm.lora.lora_model import LoRAModel
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.lora.request import LoRARequest
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.worker import lora_model_runner_mixin
from vllm.v1.worker.worker_base import WorkerBase

from safelora_vllm.errors import GuardError, SafeLoRAError
from safelora_vllm.integration.seams import slot_operators

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI

ATTEST = "safelora_attest"
_LOAD = "safelora_load"

# For tests that say when a seam can go: only here are they still vLLM's own.
vllm_shrink, vllm_expand = lora_ops.bgmv_shrink, lora_ops.bgmv_expand_slice
vllm_head = punica_cpu.PunicaWrapperCPU.add_lora_logits
_original_load: Callable[[Any, LoRARequest], LoRAModel] | None = None


def install(manager: type, attest: Callable[[Any], dict[str, Any]]) -> None:
    """Put the guarded manager into this process; the second call does nothing.

    Raises:
        GuardError: another plugin was there first.
    """
    global _original_load
    if _original_load is not None:
        return
    if lora_model_runner_mixin.LRUCacheWorkerLoRAManager is not worker_manager.LRUCacheWorkerLoRAManager:
        raise GuardError("another plugin has replaced vLLM's LoRA manager; not guarded. Uninstall it")
    _original_load = worker_manager.WorkerLoRAManager._load_adapter
    worker_manager.WorkerLoRAManager._load_adapter = _refuse_unguarded
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = manager
    lora_model.safetensors = SimpleNamespace(safe_open=Unmapped)
    setattr(WorkerBase, ATTEST, attest)
    setattr(WorkerBase, _LOAD, _load_on_rank)
    Executor.add_lora = _load_on_all_ranks
    LoRARequest.__eq__ = _same_adapter
    lora_ops.bgmv_shrink = punica_cpu.bgmv_shrink = slot_operators.shrink
    lora_ops.bgmv_expand = punica_cpu.bgmv_expand = slot_operators.expand
    lora_ops.bgmv_expand_slice = punica_cpu.bgmv_expand_slice = slot_operators.expand_slice
    PrometheusStatLogger.__init__ = _with_one_mix(PrometheusStatLogger.__init__)
    punica_cpu.PunicaWrapperCPU.add_lora_logits = _head_as_it_is
    if platforms.current_platform.is_cpu():
        KVCacheConfig.needs_kv_cache_zeroing = property(_always)


def _head_as_it_is(
    self: punica_cpu.PunicaWrapperCPU,
    y: Tensor,
    x: Tensor,
    lora_a_stacked: Tensor,
    lora_b_stacked: Tensor,
    scale: float,
    **more: Any,
) -> None:
    """No adapter changes the head: the gate refuses those that would. vLLM adds its empty slots all the same,
    on CPUs by the rows that are sampled, and the engine ends when a request asks for its prompt's
    log-probabilities, for which there are other rows."""
    del self, y, x, lora_a_stacked, lora_b_stacked, scale, more


def _always(_config: KVCacheConfig) -> bool:
    """Blocks of the key-value cache are zeroed before they are used again. On CPUs, vLLM's attention takes
    what a finished request left behind a sequence's end times zero, which for NaN and infinity is NaN: one
    adapter that overflows, as in float16 it can within any cap, would spoil whoever gets its blocks."""
    return True


def _with_one_mix(init: Callable[..., None]) -> Callable[..., None]:
    """vLLM's ``vllm:lora_requests_info`` gets a series for every mix of adapters that ever ran in one step,
    and loses none: with many tenants, memory and ``/metrics`` grow without end. Only the newest is left,
    which is the one that means something. Not with several API servers, whose series lie in shared files."""

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.gauge_lora_info is not None and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            self.gauge_lora_info = _OneMix(self.gauge_lora_info)

    return start


class _OneMix:
    """A gauge that keeps the series of its last labels."""

    def __init__(self, gauge: Any) -> None:
        self._gauge = gauge
        self._last: dict[str, Any] = {}

    def labels(self, **labels: Any) -> Any:
        if labels != self._last:
            self._gauge.clear()
            self._last = labels
        return self._gauge.labels(**labels)


def _same_adapter(self: LoRARequest, other: object) -> bool:
    """By name and id. vLLM compares names only, so that of two versions of one name in a batch, as every
    hot swap has them, only one would be put into the slots, and the other's rows would end the engine."""
    if not isinstance(other, LoRARequest):
        return False
    return bool(self.lora_int_id == other.lora_int_id and self.lora_name == other.lora_name)


def _load_on_all_ranks(self: Executor, lora_request: LoRARequest) -> bool:
    """All ranks load an adapter, or none keeps it.

    vLLM reads the ranks' answers up to the first failure. Those behind it would be taken for the answers to
    its next questions, so no rank answers with a failure here.

    Raises:
        SafeLoRAError: in the words of the ranks that could not.
    """
    failures = self.collective_rpc(_LOAD, args=(lora_request,))
    if not any(failures):
        return True
    if not all(failures):
        self.collective_rpc("remove_lora", args=(lora_request.lora_int_id,))
    raise SafeLoRAError("; ".join(dict.fromkeys(failure for failure in failures if failure)))


def _load_on_rank(self: WorkerBase, lora_request: LoRARequest) -> str:
    try:
        return "" if self.add_lora(lora_request) else f"vLLM did not take {lora_request.lora_name}"
    except Exception as error:
        return str(error) or type(error).__name__


def _refuse_unguarded(self: Any, lora_request: LoRARequest) -> LoRAModel:
    raise GuardError(
        f"{type(self).__name__} is not guarded by safelora, so {lora_request.lora_name} is not loaded"
    )


def load_published(manager: Any, request: LoRARequest) -> LoRAModel:
    """vLLM's own load of a folder; for guarded managers only."""
    assert _original_load is not None, "the guard is not installed"
    return _original_load(manager, request)


class Unmapped:
    """A safetensors file read into memory, with those calls of ``safe_open`` that vLLM makes.

    A mapped file that is cut short would end the engine at its next look at the weights, on a CPU, and one
    that is written to would change what is served. And safetensors 0.8 keeps two numbers for ever for each
    tensor that it reads from a map: where adapters are read again all day, megabytes an hour.
    """

    def __init__(self, path: str, framework: str) -> None:
        assert framework == "pt", framework
        self._tensors = load(Path(path).read_bytes())
        self.keys, self.get_tensor = self._tensors.keys, self._tensors.__getitem__

    def __enter__(self) -> Unmapped:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


def no_adapter(manager: Any, request: LoRARequest) -> LoRAModel:
    """An adapter of zeros, as vLLM makes it to warm up: its requests get the aligned model."""
    inner = manager._adapter_manager
    rank = inner.get_dummy_lora_warmup_rank(1)
    return inner.create_dummy_lora(request.lora_int_id, rank, manager.embedding_modules)


async def ask_all_workers(engine_client: Any) -> list[dict[str, Any]]:
    """The attestations of all workers of all data-parallel engines."""
    core = engine_client.engine_core
    per_engine = await asyncio.gather(
        *[
            core._call_utility_async("collective_rpc", ATTEST, None, (), None, engine=engine)
            for engine in core.core_engines
        ]
    )
    return [answer for workers in per_engine for answer in workers]


def in_flight(engine_client: Any, request: LoRARequest) -> int:
    """Requests of this API server that still generate with an adapter's weights."""
    states = engine_client.output_processor.request_states.values()
    return sum(getattr(state.lora_request, "lora_int_id", None) == request.lora_int_id for state in states)


def replace_map(models: Any, mine: Mapping[str, LoRARequest]) -> dict[str, LoRARequest]:
    """Let vLLM's routes look adapters up in ``mine``; gives what they had.

    Raises:
        GuardError: another plugin was there first.
    """
    given = models.lora_requests
    if type(given) is not dict:
        raise GuardError(
            f"vLLM's map of adapters is a {type(given).__name__} instead of a dict; not guarded. "
            "Uninstall the plugin that put it there"
        )
    models.lora_requests = mine
    return given


def add_middleware(args: Namespace, middleware: type) -> None:
    """Name an ASGI middleware in the list of ``--middleware``, which vLLM adds outside of its key check."""
    args.middleware = [*args.middleware, f"{middleware.__module__}.{middleware.__qualname__}"]


def check_middleware(app: FastAPI, middleware: type) -> None:
    """Whether it stands outside of vLLM's key check, once vLLM has built the app.

    Raises:
        GuardError: it does not.
    """
    outside_in: list[Any] = [entry.cls for entry in app.user_middleware]
    key_checks = [at for at, cls in enumerate(outside_in) if cls.__name__ == "AuthenticationMiddleware"]
    if middleware not in outside_in or any(at < outside_in.index(middleware) for at in key_checks):
        raise GuardError(
            f"vLLM has built its server without {middleware.__name__} around the key check (seam "
            f"'middleware'; it has {[cls.__name__ for cls in outside_in]}), so callers cannot be told apart"
        )


def attach_first(app: FastAPI, router: APIRouter) -> None:
    """Put our routes before vLLM's: until 0.32 its own GET /metrics would hide ours."""
    routes = app.router.routes
    before = len(routes)
    app.include_router(router)
    routes[:] = [*routes[before:], *routes[:before]]
