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
from vllm.lora.request import LoRARequest
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
from safelora_vllm.projectors.checkpoint import at_revision, locate_model
from safelora_vllm.report import Report
from safelora_vllm.settings import PLUGIN, TOWER_LORA, WEIGHT_TRANSFER, WORKER, ServerSettings
from safelora_vllm.store import PublishedStore

logger = logging.getLogger("vllm.safelora.worker")
_START_SECONDS = 900.0
# Those that read the model's safetensors files.
_LOAD_FORMATS = (
    "auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "bitsandbytes",
)  # fmt: skip


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
        target_modules=tuple(getattr(lora, "target_modules", None) or ()),  # vLLM 0.28 may not have it
    )
