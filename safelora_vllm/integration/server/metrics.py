"""What ``GET /metrics`` adds to vLLM's: one straight function from what this process knows to text."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from safelora_vllm.errors import SafeLoRAError
from safelora_vllm.gate.metrics import MAX_TENANTS, OTHERS
from safelora_vllm.integration.attestation import PoolState
from safelora_vllm.integration.seams import server as seams
from safelora_vllm.integration.server.adapter_series import (
    ReportSeries,
    pool_series,
    shown_traffic,
    traffic_series,
)
from safelora_vllm.integration.server.exam.hidden_name import HIDDEN
from safelora_vllm.integration.server.exam.no_exam import NoExam
from safelora_vllm.integration.server.exam.series import exam_series
from safelora_vllm.integration.server.exposition import family
from safelora_vllm.integration.server.one_at_a_time import OneAtATime
from safelora_vllm.integration.server.readiness import ReadinessCheck
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.traffic import Traffic, TrafficTable
from safelora_vllm.store import AdapterRecord
from safelora_vllm.store.name_record import tenant_of
from safelora_vllm.store.sizes import StoreSizes
from safelora_vllm.tenants.quotas import content_sizes

if TYPE_CHECKING:
    from safelora_vllm.integration.server.reconcile import Reconciler

logger = logging.getLogger("vllm.safelora.metrics")
_SECONDS = 6.0


class Kept(NamedTuple):
    """What the store keeps of a tenant."""

    adapters: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Known:
    """What a scrape is made of.

    entries: of the registry. workers: how many are guarded and how many are not. expected: how many there
    should be. tenants: what the store keeps of each. traffic: of each adapter. pools: what each worker has
    loaded. sizes: of the store's parts. limit: ``--store-bytes``. failures: survived, by kind. exam: of this
    server. has_key: the metrics need a key.
    """

    entries: Sequence[Entry] = ()
    workers: Mapping[str, int] = field(default_factory=dict)
    expected: int = 0
    tenants: Mapping[str, Kept] = field(default_factory=dict)
    traffic: Mapping[str, Traffic] = field(default_factory=dict)
    pools: Sequence[PoolState] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    limit: int | None = None
    uploads: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    ready: bool = True
    exam: NoExam = field(default_factory=NoExam)
    has_key: bool = False
    keys_current: bool | None = None


@dataclass(frozen=True)
class Outside:
    """What a scrape has from others. counters: the gate's text. tenants: what the store keeps of each."""

    counters: str = ""
    tenants: Mapping[str, Kept] = field(default_factory=dict)


def expose(known: Known, reports: ReportSeries | None = None) -> str:
    """The exposition text. reports: keeps text from one scrape to the next."""
    served = [entry for entry in known.entries if entry.served]
    tenants = _bounded(known.tenants)
    parts = {part: count for part, count in known.sizes.items() if part != "free"}
    free = [((), known.sizes["free"])] if "free" in known.sizes else []
    limit = [] if known.limit is None else [((), known.limit)]
    keys = [] if known.keys_current is None else [((), int(known.keys_current))]
    versions = importlib.metadata.version("safelora-vllm"), seams.vllm_version()
    texts = [
        family("safelora_adapters", [((), float(len(served)))]),
        *(reports or ReportSeries()).expose(served),
        *traffic_series(shown_traffic(known.traffic, known.entries)),
        *pool_series(known.pools, served),
        *exam_series(known.exam, served, known.has_key),
        family("safelora_tenant_adapters", [((t,), kept.adapters) for t, kept in tenants.items()]),
        family("safelora_tenant_bytes", [((t,), kept.bytes) for t, kept in tenants.items()]),
        family("safelora_workers", [((state,), count) for state, count in known.workers.items()]),
        family("safelora_workers_expected", [((), known.expected)]),
        family("safelora_ready", [((), int(known.ready))]),
        family("safelora_keys_current", keys),
        family("safelora_store_bytes", [((part,), count) for part, count in parts.items()]),
        family("safelora_store_limit_bytes", limit),
        family("safelora_store_free_bytes", free),
        family("safelora_uploads_in_flight", [((), known.uploads)]),
        family("safelora_failures_survived_total", [((k,), n) for k, n in known.failures.items()]),
        family("safelora_build_info", [(versions, 1)]),
    ]
    return "".join(texts)


def kept_of_tenants(records: Mapping[str, AdapterRecord]) -> dict[str, Kept]:
    """Tenant → what is kept of it, from all records of a store; the empty name owns what is shared."""
    owned: dict[str, dict[str, AdapterRecord]] = {}
    for name, record in records.items():
        owned.setdefault(tenant_of(name), {})[name] = record
    return {owner: Kept(len(own), sum(content_sizes(own).values())) for owner, own in sorted(owned.items())}


def _bounded(kept: Mapping[str, Kept]) -> dict[str, Kept]:
    """The largest, and all others together."""
    largest = sorted(kept, key=lambda tenant: (-kept[tenant].bytes, tenant))
    shown = {tenant: kept[tenant] for tenant in largest[:MAX_TENANTS]}
    if rest := [kept[tenant] for tenant in largest[MAX_TENANTS:]]:
        shown[OTHERS] = Kept(*map(sum, zip(*rest, strict=True)))
    return shown


class Metrics:
    """The metrics of one API server process.

    Args:
        reconciler: of the process.
        traffic: its counters.
        expected: workers that the server has.
        limit: ``--store-bytes``.
        has_key: the metrics need a key.
        keys_current: whether the keys in force are those of the keys file; None without one.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        traffic: TrafficTable,
        expected: int,
        limit: int | None = None,
        has_key: bool = False,
        keys_current: Callable[[], bool] | None = None,
    ) -> None:
        self.traffic, self._has_key, self._keys_current = traffic, has_key, keys_current
        self._reconciler, self._expected, self._limit = reconciler, expected, limit
        self._reports = ReportSeries(reconciler.copies.has_opinion)
        self._sizes = StoreSizes(reconciler.names.root)
        self.readiness = ReadinessCheck(reconciler, expected, keys_current)
        self._outside, self._last = OneAtATime(self._gate_and_store, _SECONDS), Outside()

    def count_now(self) -> None:
        """Bring what changes by itself up to date: rows of adapters that are gone, requests in flight."""
        registry = self._reconciler.registry
        self.traffic.keep_only(registry.keys())
        for name in registry:
            self.traffic.serve(name)
        running, waiting = seams.requests_now(self._reconciler.pool.engine_client)
        for counts in (running, waiting):
            for name in [name for name in counts if name.startswith(HIDDEN)]:
                del counts[name]
        self.traffic.in_flight(running, waiting)

    async def text(self, uploads: int) -> str:
        """All series. Waits for the gate and the store, for a while; what is missing is left out."""
        findings = await self.readiness.findings()
        try:
            self._last = await self._outside.answer()
        except TimeoutError:
            logger.warning("no new metrics of gate and store: they do not answer")
            self._last = replace(self._last, counters="")  # there is an alert for a gate without them
        self.count_now()
        watchdog = self._reconciler.watchdog
        known = Known(
            entries=list(self._reconciler.registry.values()),
            workers=watchdog.workers,
            expected=self._expected,
            tenants=self._last.tenants,
            pools=watchdog.pools,
            limit=self._limit,
            uploads=uploads,
            failures={
                "copy_withdrawn": watchdog.withdrawn,
                "gate_restart": sum(pool.gate_restarts for pool in watchdog.pools),
                "step_load": sum(pool.failed_steps for pool in watchdog.pools),
            },
            ready=findings.answer(strict=True).ready,
            exam=self._reconciler.copies.exam,
            has_key=self._has_key,
        )
        return self._last.counters + await asyncio.to_thread(self._text, known)

    def _text(self, known: Known) -> str:
        known = replace(
            known,
            traffic=self.traffic.snapshot(),
            sizes=self._sizes.known(),
            keys_current=self._keys_current() if self._keys_current else None,
        )
        return expose(known, self._reports)

    def _gate_and_store(self) -> Outside:
        try:
            counters = self._reconciler.copies.gate.metrics(timeout=5.0)
        except SafeLoRAError as error:
            logger.warning("no gate metrics: %s", error)
            counters = ""
        try:
            return Outside(counters, kept_of_tenants(self._reconciler.names.all()))
        except SafeLoRAError as error:
            logger.warning("no metrics of tenants: %s", error)
            return Outside(counters)
