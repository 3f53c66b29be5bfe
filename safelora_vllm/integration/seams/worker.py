"""What guards the processes of an engine: the LoRA manager, every load, and the attestation.

What each needs of vLLM is in `table`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from vllm.lora import worker_manager
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.v1.worker import lora_model_runner_mixin
from vllm.v1.worker.worker_base import WorkerBase

from safelora_vllm.errors import GuardError
from safelora_vllm.integration.seams.table import ATTEST, PREPARE

_original_load: Callable[[Any, LoRARequest], LoRAModel] | None = None


def install(
    manager: type, attest: Callable[[Any], dict[str, Any]], prepare: Callable[[Any, str, int, str], bool]
) -> None:
    """Put the guarded manager into this process; the second call does nothing.

    Args:
        manager: in place of vLLM's ``LRUCacheWorkerLoRAManager``.
        attest: the method of each worker that answers `ATTEST`.
        prepare: the one that answers `PREPARE`.

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
    setattr(WorkerBase, ATTEST, attest)
    setattr(WorkerBase, PREPARE, prepare)


def _refuse_unguarded(self: Any, lora_request: LoRARequest) -> LoRAModel:
    raise GuardError(
        f"{type(self).__name__} is not guarded by safelora, so {lora_request.lora_name} is not loaded"
    )


def load_published(manager: Any, request: LoRARequest) -> LoRAModel:
    """vLLM's own load of a folder, into memory of its own; for guarded managers only.

    What vLLM does not pin, it leaves mapped: it would be read when it is used, within a step.
    """
    assert _original_load is not None, "the guard is not installed"
    model = _original_load(manager, request)
    for layer in model.loras.values():
        layer.lora_a, layer.lora_b = _in_memory(layer.lora_a), _in_memory(layer.lora_b)
    return model


def _in_memory(weights: Any) -> Any:
    if isinstance(weights, list):  # of a module that vLLM stacks
        return [_in_memory(part) for part in weights]
    return weights if weights is None or weights.is_pinned() else weights.clone()


def zeros(manager: Any) -> LoRAModel:
    """An adapter of zeros, as vLLM makes it to warm up, with one module: the others of a slot are emptied.

    All modules of a mixture of experts would be tens of thousands of tensors.
    """
    inner = manager._adapter_manager
    made = inner.create_dummy_lora(1, inner.get_dummy_lora_warmup_rank(1), manager.embedding_modules)
    plain = [name for name, layer in made.loras.items() if "experts" not in name and layer.lora_a is not None]
    made.loras = {name: made.loras[name] for name in plain[:1]} or made.loras
    return made


def held(manager: Any, lora_id: int) -> LoRAModel | None:
    """What host memory has under an id."""
    inner = getattr(manager, "_adapter_manager", None)
    return None if inner is None else inner._registered_adapters.get(lora_id)


def is_dummy(request: LoRARequest) -> bool:
    """Whether vLLM asks to warm up: what fails then has to end the start."""
    return bool(request.lora_path == "/not/a/real/path")


def drop(manager: Any, lora_id: int) -> None:
    """Forget an adapter, and what of it is in a slot."""
    if (inner := getattr(manager, "_adapter_manager", None)) is not None:
        inner.remove_adapter(lora_id)


def loaded(manager: Any) -> tuple[Collection[int], Collection[int]]:
    """Ids of the adapters on the device and in host memory. Not copied: look at once."""
    inner = getattr(manager, "_adapter_manager", None)
    if inner is None:  # the model is not loaded yet
        return (), ()
    return inner._active_adapters.keys(), inner._registered_adapters.keys()


def sizes(manager: Any) -> tuple[int, int]:
    """How many adapters fit on the device, and in host memory."""
    inner = manager._adapter_manager
    return int(inner.lora_slots), int(inner.capacity)
