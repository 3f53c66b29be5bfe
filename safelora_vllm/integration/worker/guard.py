"""The guard inside a vLLM worker: no weights reach the multi-LoRA pool but those the gate published.

The first worker of a host to get the lock starts the gate process on its own device; the others
(tensor or pipeline parallel ranks) only read what it publishes. Source of the guarded behaviour:
``vllm/lora/worker_manager.py``.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform

from safelora_vllm.errors import GateUnavailable, GuardError, StoreUnavailable, refuse
from safelora_vllm.files import FoundSound, states
from safelora_vllm.gate.client import GateClient
from safelora_vllm.gate.protocol import GateConfig, GateState
from safelora_vllm.gate.socket_folder import SOCKET, private_folder, remove_leftovers, take_ownership
from safelora_vllm.gate.supervisor import GateProcess
from safelora_vllm.integration import runtime_updating
from safelora_vllm.integration.adapter_uri import SCHEME, published_key
from safelora_vllm.integration.attestation import Attestation, PoolState
from safelora_vllm.integration.seams import kv_connectors
from safelora_vllm.integration.seams import worker as seams
from safelora_vllm.integration.worker.pool_counts import PoolCounts
from safelora_vllm.integration.worker.read_ahead import NotReadYet, ReadAhead, about
from safelora_vllm.projectors.checkpoint import at_revision, locate_model
from safelora_vllm.report import Report
from safelora_vllm.settings import PLUGIN, TOWER_LORA, WEIGHT_TRANSFER, WORKER, ServerSettings
from safelora_vllm.store import PublishedStore

logger = logging.getLogger("vllm.safelora.worker")
_START_SECONDS = 900.0
_LOAD_SECONDS = 0.02  # that a load may hold up the steps for what was not read ahead: an adapter of 4 MB
# Those that read the model's safetensors files.
_LOAD_FORMATS = (
    "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "bitsandbytes",
)  # fmt: skip
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


class WorkerGuard:
    """One worker's view of the gate: where it listens and what it has accepted.

    lost: paths of accepted adapters whose published copy could not be read again.
    """

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        runtime_updating.check_off()
        if PLUGIN not in os.environ.get("VLLM_PLUGINS", "").split(","):
            raise GuardError(
                f"VLLM_PLUGINS does not name {PLUGIN}, so vLLM has not loaded what checks callers' keys. "
                f"Set VLLM_PLUGINS={PLUGIN} (with the other plugins that you use, comma-separated)"
            )
        if vllm_config.weight_transfer_config is not None:
            raise GuardError(WEIGHT_TRANSFER)
        if getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
            raise GuardError(TOWER_LORA)
        kv_connectors.check(vllm_config.kv_transfer_config)
        self._settings = ServerSettings.from_additional_config(vllm_config.additional_config)
        self.lost: set[str] = set()
        self._accepted: dict[tuple[str, int, str], str] = {}
        self._taken = FoundSound()
        self._store = PublishedStore(self._settings.store)
        self._process: GateProcess | None = None
        remove_leftovers()
        folder = private_folder(vllm_config.instance_id)
        self._client = GateClient(str(folder / SOCKET))
        self._owner_lock = take_ownership(folder)
        if self._owner_lock is not None:
            chosen = self._settings.gate_device
            own = device if chosen == WORKER else _device(chosen)
            where, environment = _only_device(own)
            config = _gate_config(vllm_config, where, self._settings, self._client.socket_path)
            if not self._settings.trust_served_model:
                locate_model(config.model)  # a hub id is downloaded here: the gate gets no token of the hub
            logger.info("starting the gate on %s; it reads the projector cache", own)
            self._process = GateProcess(config, environment)
        self.state = self._wait_for_gate()

    def resolve(self, request: LoRARequest) -> str:
        """The key of a request's published copy: its own, or by letting its folder pass the gate.

        Raises:
            AdapterRefused: the gate refuses the folder.
            StoreUnavailable: the published copy is missing or damaged.
            GateUnavailable: the gate is down.
            GuardError: the copy was made by other rules than this server's.
        """
        known = self._key(request)
        key = known or self._admit(request)
        self._check_copy(key, request.lora_name)
        self._store.touch(key)
        if known is None:
            self._accepted[_identity(request)] = key
        return key

    def folder(self, key: str) -> Path:
        """Where a published copy is."""
        return self._store.path(key)

    def forget(self, key: str) -> None:
        """A copy could not be read: it is checked again before the next time."""
        self._taken.forget(key)
        self._store.forget(key)

    def still_sound(self, key: str) -> bool:
        """Whether the copy is the one that `resolve` checked: it may be exchanged before it is read."""
        return self._taken.has(key, self._store.files(key))

    def _admit(self, request: LoRARequest) -> str:
        """Let a folder pass the gate.

        Raises:
            AdapterRefused: the gate's answer; or there is an exam or a second opinion, which API servers hold
                and workers cannot.
        """
        if self._settings.second_opinion or self._settings.policy.get("opinion"):
            raise refuse(
                "second_opinion",
                "with a second opinion a worker loads only what an API server serves, as that asks the "
                "aligned model: upload the adapter to a server, or give it with --lora-modules; offline, "
                "leave `second_opinion` and the policy's `opinion` out",
            )
        if self._settings.exam == "enforce":
            raise refuse(
                "exam",
                "with `exam` enforce a worker loads only what an API server has examined: upload the adapter "
                "to a server, or give it with --lora-modules; offline, leave `exam` out",
            )
        return self._client.admit(request.lora_path, request.lora_name, keep=False).accepted_key()

    def _check_copy(self, key: str, name: str) -> None:
        """Whether the published copy is whole and made by this server's rules; read once, then remembered."""
        if self._taken.has(key, files := self._store.files(key)):
            return
        try:
            found = states(files)
        except OSError:
            found = ()
        report = self._store.find(key)
        if report is None:
            raise StoreUnavailable(
                f"the published copy of {name} is missing or damaged in the adapter store; load the "
                "adapter again"
            )
        self._check_rules(key, report)
        self._taken.add(key, found)

    def _check_rules(self, key: str, report: Report) -> None:
        """A store may hold copies made for another server: under laxer rules, or unprojected.

        The copy says itself whether an admin's override asked for it: this may run inside of a step.
        """
        if not report.accepted or report.projectors != self.state.projectors:
            raise GuardError(f"{SCHEME}{key} was made with other projectors than this server's")
        if not (report.policy.at_least_as_strict(self.state.policy) or self._store.has_override(key)):
            raise GuardError(f"{SCHEME}{key} was made by less strict rules than this server's")

    def _key(self, request: LoRARequest) -> str | None:
        if request.lora_path.startswith(SCHEME):
            return published_key(request.lora_path)
        return None if request.load_inplace else self._accepted.get(_identity(request))

    def _wait_for_gate(self) -> GateState:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return self._client.state(timeout=10.0)
            except GateUnavailable as error:
                if self._process is not None or time.monotonic() > deadline:
                    raise GuardError(f"this worker has no gate: {error}") from error
                time.sleep(0.1)

    @property
    def gate_restarts(self) -> int:
        """How often the gate was started again, by the worker that owns it."""
        return self._process.restarts if self._process else 0

    def attestation(self, pool: PoolState) -> Attestation:
        """What the API side is told. Short: it runs between two engine steps."""
        return Attestation(
            guarded=True,
            socket=self._client.socket_path,
            projectors=self.state.projectors,
            policy=self.state.policy.id,
            lost=sorted(self.lost),
            pool=pool,
        )


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


def _identity(request: LoRARequest) -> tuple[str, int, str]:
    return request.lora_name, request.lora_int_id, request.lora_path


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise GuardError(f"gate_device is {name!r}, which torch does not know; try cpu") from error


def _only_device(device: torch.device) -> tuple[str, dict[str, str]]:
    """A device of this worker's for a process that sees no other one, and the variable that makes it so.

    A process that sees several opens each of its threads on the first, which takes memory there.

    Raises:
        GuardError: this worker does not see it.
    """
    if device.type != "cuda" or device.index is None:
        return str(device), {}
    variable = current_platform.device_control_env_var
    seen = os.environ.get(variable)
    names = seen.split(",") if seen else [str(number) for number in range(torch.cuda.device_count())]
    if device.index >= len(names):
        raise GuardError(f"gate_device is {device}, but this worker sees {len(names)} devices of that kind")
    return "cuda:0", {variable: names[device.index].strip()}


def _gate_config(vllm_config: Any, device: str, settings: ServerSettings, socket_path: str) -> GateConfig:
    model, lora = vllm_config.model_config, vllm_config.lora_config
    form = vllm_config.load_config.load_format
    if form not in _LOAD_FORMATS and not settings.trust_served_model:
        raise GuardError(
            f"load_format is {form}: vLLM would load other weights than those that are compared with the "
            f"aligned model's. Expected one of {', '.join(_LOAD_FORMATS)}; `trust_served_model` leaves all "
            "comparing out"
        )
    return GateConfig(
        socket=socket_path,
        model=at_revision(model.model, model.revision),
        settings=settings,
        device=device,
        dtype=str(lora.lora_dtype).removeprefix("torch."),
        max_rank=lora.max_lora_rank,
    )
