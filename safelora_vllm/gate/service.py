"""What the gate answers: adapters judged and published, copies made again, its figures, its state.

One adapter is judged at a time. `safelora_vllm.gate.server` is the process around it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from safelora_vllm.adapters.read import Limits
from safelora_vllm.errors import (
    GateUnavailable,
    QuotaExceeded,
    SafeLoRAError,
    StoreUnavailable,
    UsageError,
)
from safelora_vllm.gate.admit import GateSettings, admit, charged
from safelora_vllm.gate.memory import allocator_of, described, give_back, no_memory, placed
from safelora_vllm.gate.metrics import GateMetrics
from safelora_vllm.gate.protocol import (
    Admit,
    Answer,
    Call,
    Ensure,
    GateConfig,
    GateState,
    GetMetrics,
    GetState,
    Judgement,
    Metrics,
)
from safelora_vllm.gate.refusals import Refusals, log_refusal
from safelora_vllm.methods.judge import warm_up
from safelora_vllm.methods.reads import parts_read, truncation
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.placement import Placement
from safelora_vllm.projectors.sizes import groups_of_cache
from safelora_vllm.served_model import check_served_model
from safelora_vllm.store import PublishedStore, RawStore
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.store.housekeeping import check_store, clean, collect, collect_unreferenced
from safelora_vllm.store.layout import AUDIT
from safelora_vllm.store.verdict_pruning import prune_verdicts

logger = logging.getLogger("vllm.safelora.gate")
_COLLECT_SECONDS = 300.0
_UNREFERENCED_SECONDS = 1800.0  # longer than from keeping an upload to naming it, exams included
_HEADER_BYTES = 16 * 1024**2


class GateService:
    """Answers calls.

    Raises:
        GuardError: every user of this machine may write to the store.
        ProjectorCacheError, PolicyError, CheckpointError: the settings do not fit each other.
        UsageError: too little memory for what the policy reads.
    """

    def __init__(self, config: GateConfig) -> None:
        given = config.settings
        check_store(given.store)
        cache, policy = ProjectorCache(given.projectors), Policy.from_mapping(given.policy)
        cache.verify()
        if not given.trust_served_model:
            check_served_model(cache, config.model)
        device, parts = torch.device(config.device), parts_read(policy, cache.thin)
        self._placement = _placement(config, cache, policy)
        cache.load(device, self._placement, **dataclasses.asdict(parts))
        self._settings = GateSettings(
            cache=cache,
            policy=policy,
            device=device,
            dtype=getattr(torch, config.dtype),
            limits=Limits(
                weights_bytes=_weights_bytes(config, cache),
                max_rank=config.max_rank,
                target_modules=_targets(config, cache),
            ),
            base_model=Path(config.model).name,
        )
        if lost := truncation(policy, cache):
            logger.warning("%s", lost)
        self._allocator = allocator_of(device)
        if device.type != "cpu":
            _warm_up(self._settings)
            give_back(self._allocator, self._placement)
        logger.info(described(self._placement, device))
        self._published, self._raw = PublishedStore(given.store), RawStore(given.store)
        self._audit = AuditLog(Path(given.store) / AUDIT)
        self._store_bytes = given.store_bytes
        clean(given.store)
        self._metrics = GateMetrics(CollectorRegistry())
        self._metrics.describe(cache, self._placement, policy.enforcing)
        self._refusals = Refusals()
        self._one_at_a_time = threading.Lock()
        self._one_remake = threading.Lock()
        self._busy_since: float | None = None

    def answer(self, call: Call) -> Answer:
        """The answer to a call; see its class for what it asks."""
        match call:
            case Admit():
                return self.admit(call)
            case Ensure():
                return self.ensure(call)
            case GetMetrics():
                return Metrics(self._metrics.expose())
            case GetState():
                return self.state()

    def admit(self, call: Admit) -> Judgement:
        """Run the gate on one adapter folder or archive."""
        settings = self._settings_for(call.policy, call.override)
        raw = self._raw if call.keep else None
        try:
            with self._one_at_a_time, self._busy():
                try:
                    admission = admit(
                        call.path, call.name, settings, self._published, raw, call.allowance, call.signing
                    )
                finally:
                    give_back(self._allocator, self._placement)
        except (QuotaExceeded, UsageError):  # the caller's mistake, such as a folder that is not there
            raise
        except SafeLoRAError as error:
            self._metrics.record_error(type(error).__name__, call.name)
            raise
        except torch.OutOfMemoryError as error:
            self._metrics.record_error(type(error).__name__, call.name)
            raise GateUnavailable(no_memory(str(self._settings.device), "this adapter")) from error
        self._metrics.record(admission)
        if call.override and admission.key is not None:
            self._published.mark_override(admission.key)
        if self._store_bytes is not None and not admission.cached:
            self._collect(self._store_bytes)
        if not call.keep and admission.key is None:
            log_refusal(self._audit, call.name, admission.report, settings)
        return Judgement(
            admission.report,
            admission.key,
            admission.nbytes,
            self._settings.ruleset_digest,
            admission.stages.seconds,
        )

    def ensure(self, call: Ensure) -> Judgement:
        """The published copy of stored content under a policy, made again where it is missing."""
        settings, digest, name = self._settings_for(call.policy, call.override), call.digest, call.name
        if not self._raw.has(digest):
            raise StoreUnavailable(f"the store has no content {digest}; upload {name} again")
        key = settings.key(digest)
        if refused := self._refusals.find(key, name):
            return refused
        # Read again: a worker may ask because it could not, and a bad disk does not show in a file's state.
        if (report := self._published.find(key, again=True)) is None:
            if wrong := self._raw.damaged(digest, again=True):
                found = f"the store's content {digest} is damaged ({wrong})"
                raise StoreUnavailable(f"{found}; upload {name} again")
            with self._one_remake:  # of several servers that ask at once, the later ones find the answer
                if refused := self._refusals.find(key, name):
                    return refused
                made = self.admit(Admit(str(self._raw.path(digest)), name, call.policy, call.override))
                if made.report.digest != digest:
                    raise StoreUnavailable(f"the store's content {digest} has changed; upload {name} again")
                if made.key is None:
                    self._refusals.add(key, made)
                return made
        self._published.touch(key)
        if call.override:
            self._published.mark_override(key)
        nbytes = charged(report, self._raw.nbytes(digest), settings.cache)
        return Judgement(report.named(name), key, nbytes, self._settings.ruleset_digest)

    def state(self) -> GateState:
        """What this gate says of itself."""
        settings, since = self._settings, self._busy_since
        return GateState(
            projectors=settings.cache.id,
            policy=settings.policy,
            ruleset_digest=settings.ruleset_digest,
            store=str(self._published.root),
            pid=os.getpid(),
            busy_seconds=time.monotonic() - since if since is not None else 0.0,
            frame=list(settings.frame),
        )

    def _settings_for(self, policy: Mapping[str, Any], override: bool) -> GateSettings:
        """The settings with some of the policy's fields replaced.

        Without an admin's ``override`` they can only make it stricter: of what was once set under another
        server's policy, that stays which is stricter than this one's.

        Raises:
            PolicyError: values out of range.
        """
        asked, own = self._settings.under(policy), self._settings.policy
        if override or asked.policy.at_least_as_strict(own):
            return asked
        logger.warning("a kept policy (%s) cannot be compared with the server's (%s)", asked.policy, own)
        return self._settings.under(dataclasses.asdict(own.tightened(asked.policy)))

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        self._busy_since = time.monotonic()
        try:
            yield
        finally:
            self._busy_since = None

    def keep_clean(self) -> None:
        """Free the space of uploads that no name refers to any more, every few minutes, without end.

        They are no part of a tenant's quota: what they upload and remove again would fill the disk.
        """
        while True:
            try:
                collect_unreferenced(self._published.root, _UNREFERENCED_SECONDS)
                prune_verdicts(self._published.root)
            except Exception as error:  # such as a record that cannot be read: nothing may go then
                logger.warning("unreferenced uploads are kept: %s", error)
            time.sleep(_COLLECT_SECONDS)

    def _collect(self, store_bytes: int) -> None:
        """Remove old copies. What was accepted is served, whether that works or not."""
        try:
            collect(self._published.root, store_bytes)
        except Exception:  # whatever it is, the next upload tries again
            logger.exception("the adapter store %s could not be kept small", self._published.root)


def _weights_bytes(config: GateConfig, cache: ProjectorCache) -> int:
    """Most bytes of a weights file: see `GateConfig`, max_rank."""
    sides = sum(sum(entry.shape) for entry in cache.modules.values())
    factors = torch.float32.itemsize * config.max_rank * sides
    return min(config.settings.max_adapter_bytes, 4 * factors + _HEADER_BYTES)


def _targets(config: GateConfig, cache: ProjectorCache) -> tuple[str, ...]:
    """Which modules adapters may change. What vLLM applies by other names is not known here."""
    known = {module.rpartition(".")[2] for module in cache.modules}
    if odd := sorted({*config.target_modules} - known):
        raise UsageError(
            f"--lora-target-modules has {', '.join(odd)}: expected last parts of the names of modules with "
            f"projectors, {', '.join(sorted(known))}. Of what vLLM packs, such as qkv_proj, name the parts"
        )
    return tuple(sorted(config.target_modules))


def _placement(config: GateConfig, cache: ProjectorCache, policy: Policy) -> Placement:
    """Where the projectors will be, in the memory that the settings allow.

    Raises:
        UsageError: it is too little, or the gate is on a CPU and has no other memory than its host's.
        PolicyError: the policy has more energy than the cache.
    """
    given, groups = config.settings, groups_of_cache(cache, parts_read(policy, cache.thin))
    device, memory = torch.device(config.device), (given.projector_memory, given.projector_host_memory)
    return placed(groups, policy, device, config.max_rank, *memory)[1]


def _warm_up(settings: GateSettings) -> None:
    """In a thread that ends: torch gives what its libraries hold for a thread to the next one."""

    def work() -> None:
        with torch.inference_mode():
            limit = settings.limits.max_rank
            warm_up(settings.cache, settings.policy, settings.device, settings.dtype, limit)

    with ThreadPoolExecutor(1) as thread:
        thread.submit(work).result()


__all__ = ["GateService"]
