"""vLLM's LoRA manager in a worker: loads what the guard has let through, counts, and survives what fails."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from safelora_vllm.errors import StoreUnavailable
from safelora_vllm.integration.adapter_uri import SCHEME
from safelora_vllm.integration.seams import worker as seams
from safelora_vllm.integration.worker.guard import WorkerGuard
from safelora_vllm.integration.worker.pool_counts import PoolCounts
from safelora_vllm.integration.worker.read_ahead import NotReadYet, ReadAhead, about

logger = logging.getLogger("vllm.safelora.worker")
_LOAD_SECONDS = 0.02  # that a load may hold up the steps for what was not read ahead: an adapter of 4 MB
_READS = 2  # of a copy that is exchanged meanwhile: another gate on the store may have made it again


class GuardedLoRAManager(LRUCacheWorkerLoRAManager):  # type: ignore[misc]  # vllm is not type-checked
    """vLLM's LoRA manager, whose only way to weights is the gate."""

    _zeros: LoRAModel
    _in_step = _only_zeros = False

    def __init__(self, vllm_config: Any, device: torch.device, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, device, *args, **kwargs)
        self.guard = WorkerGuard(vllm_config, device)
        self.read_ahead = ReadAhead(self._read, device)
        self.counts = PoolCounts(getattr(vllm_config.parallel_config, "data_parallel_index", 0))

    def create_lora_manager(self, *args: Any, **kwargs: Any) -> Any:
        """As in vLLM. Zeros are made now: within a step, memory for them might be missing."""
        model = super().create_lora_manager(*args, **kwargs)
        self._zeros = seams.zeros(self)
        return model

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """As in vLLM, but counts loads and evictions, and leaves nothing of what fails.

        vLLM registers an adapter, then fills its slot module by module. One that fails halfway would be taken
        for loaded the next time, and answer with what another adapter has left in the rest of the slot.

        False where it is still being read: vLLM logs an error here as one of its own, with its traceback.
        """
        before = seams.held(self, lora_request.lora_int_id) if lora_request.load_inplace else None
        try:
            with self.counts.change(self, lora_request.lora_int_id, self._in_step):
                return bool(super().add_adapter(lora_request))
        except NotReadYet:
            logger.info(
                "adapter %r is read beside the steps", lora_request.lora_name, extra=about(lora_request)
            )
            return False
        except Exception as error:
            if (
                seams.held(self, lora_request.lora_int_id) is not before
            ):  # a failed read leaves what was there
                seams.drop(self, lora_request.lora_int_id)
            if not self._in_step or seams.is_dummy(lora_request):
                raise
            self._give_up(lora_request, error)
            return self._add_zeros(lora_request)

    def _add_zeros(self, lora_request: LoRARequest) -> bool:
        self._only_zeros = True
        try:
            with self.counts.change(self, lora_request.lora_int_id, self._in_step):
                return bool(super().add_adapter(lora_request))
        finally:
            self._only_zeros = False

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        """As in vLLM, but remembers that an error from here on would end the engine."""
        self._in_step = True
        try:
            super().set_active_adapters(requests, mapping)
        finally:
            self._in_step = False

    def _read(self, lora_request: LoRARequest) -> LoRAModel:
        """The published weights of a request. Touches nothing of the pool: a thread may do it."""
        for _ in range(_READS):
            key = self.guard.resolve(lora_request)
            # A new request: whatever else the old one says must not change what is loaded.
            published = LoRARequest(
                lora_name=lora_request.lora_name,
                lora_int_id=lora_request.lora_int_id,
                lora_path=str(self.guard.folder(key)),
            )
            try:
                model = seams.load_published(self, published)
            except Exception:
                self.guard.forget(key)
                raise
            if self.guard.still_sound(key):
                return model
        raise StoreUnavailable(
            f"the published copy of {lora_request.lora_name} changes while it is read; load it again"
        )

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        if self._only_zeros:
            return self._zeros.clone(lora_request.lora_int_id)
        try:
            if lora_request.lora_path.startswith(SCHEME) and not self._in_step:
                return self.read_ahead.read(lora_request, _LOAD_SECONDS)
            return self.read_ahead.take(lora_request) or self._read(lora_request)
        except Exception as error:
            if not self._in_step:
                raise
            self._give_up(lora_request, error)
            return self._zeros.clone(lora_request.lora_int_id)

    def _give_up(self, lora_request: LoRARequest, error: Exception) -> None:
        """Within a step an error would end the engine: the adapter is withdrawn by the API servers."""
        logger.error(
            "adapter %r cannot be loaded (%s); its requests are answered by the aligned model alone",
            lora_request.lora_name, error, extra=about(lora_request),
        )  # fmt: skip
        self.counts.failed_steps += lora_request.lora_path not in self.guard.lost
        self.guard.lost.add(lora_request.lora_path)


def attest(worker: Any) -> dict[str, Any]:
    """RPC ``safelora_attest``, a method of every worker: an `Attestation`, unless it is not guarded."""
    manager = getattr(getattr(worker, "model_runner", None), "lora_manager", None)
    if isinstance(manager, GuardedLoRAManager):
        manager.read_ahead.forget_old()
        pool = manager.counts.state(manager, manager.guard.gate_restarts)
        return manager.guard.attestation(pool).to_dict()
    return {"guarded": False, "lora": manager is not None}


def prepare(worker: Any, name: str, lora_id: int, path: str) -> bool:
    """RPC ``safelora_prepare``, a method of every worker: read a published adapter ahead.

    Whether the pool can take it now. Asked again and again; it never waits, and never fails: what is wrong
    with the adapter its load will say.
    """
    try:
        manager = worker.model_runner.lora_manager
        request = LoRARequest(lora_name=name, lora_int_id=lora_id, lora_path=path)
        ready = not path.startswith(SCHEME) or lora_id in manager.list_adapters()
        return ready or bool(manager.read_ahead.begin(request))
    except Exception as error:  # an answer that is an error would be taken for that to another question
        where = {"adapter": name, "copy": path}
        logger.info("adapter %r is not read ahead (%s)", name, error, extra=where)
        return True
