"""Prometheus counters of one gate, in the gate's own process. The registry is passed in, never global."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from safelora_vllm.gate.admit import Admission
from safelora_vllm.gate.reason_codes import FAILED, REFUSED
from safelora_vllm.metric_table import BY_NAME
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.placement import Placement
from safelora_vllm.store.name_record import tenant_of

MAX_TENANTS, OTHERS = 200, "(others)"  # the latter is no tenant's name
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class GateMetrics:
    """Counters of one gate."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._loads = Counter(
            "safelora_loads",
            BY_NAME["safelora_loads_total"].meaning,
            ["result", "reason"],
            registry=registry,
        )
        self._tenant_loads = Counter(
            "safelora_tenant_loads",
            BY_NAME["safelora_tenant_loads_total"].meaning,
            ["tenant", "result"],
            registry=registry,
        )
        # There from the start, so that an increase has the first one.
        self._loads.labels("accepted", "")
        for code in REFUSED:
            self._loads.labels("refused", code)
        for error in FAILED:
            self._loads.labels("error", error)
        self._tenants: set[str] = set()
        self._tenant("")
        self._stages = Histogram(
            "safelora_stage_seconds",
            BY_NAME["safelora_stage_seconds"].meaning,
            ["stage"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._cache = Counter(
            "safelora_gate_cache",
            BY_NAME["safelora_gate_cache_total"].meaning,
            ["outcome"],
            registry=registry,
        )
        for outcome in ("hit", "miss"):
            self._cache.labels(outcome)  # there from the start, so that rates can be computed
        self._bytes = Gauge(
            "safelora_projector_bytes",
            BY_NAME["safelora_projector_bytes"].meaning,
            ["tier"],
            registry=registry,
        )
        self._budget = Gauge(
            "safelora_gate_memory_budget_bytes",
            BY_NAME["safelora_gate_memory_budget_bytes"].meaning,
            registry=registry,
        )
        self._transient = Gauge(
            "safelora_gate_memory_transient_bytes",
            BY_NAME["safelora_gate_memory_transient_bytes"].meaning,
            registry=registry,
        )
        self._enforcing = Gauge(
            "safelora_enforcing", BY_NAME["safelora_enforcing"].meaning, registry=registry
        )

    def describe(self, cache: ProjectorCache, placement: Placement, enforcing: bool) -> None:
        """Set the gauges that do not change while the gate lives."""
        for tier, count in cache.resident_bytes().items():
            self._bytes.labels(tier).set(count)
        self._budget.set(placement.budget)
        self._transient.set(placement.transient)
        self._enforcing.set(enforcing)

    def record(self, admission: Admission) -> None:
        """Count one answer of the gate."""
        report = admission.report
        reason = "" if report.accepted else report.reasons[0].code
        self._count("accepted" if report.accepted else "refused", reason, report.adapter)
        if report.digest:
            self._cache.labels("hit" if admission.cached else "miss").inc()
        for stage, seconds in admission.stages.seconds.items():
            self._stages.labels(stage).observe(seconds)

    def record_error(self, reason: str, name: str = "") -> None:
        """Count a load that failed without an answer, e.g. on a full disk. name: of the adapter."""
        self._count("error", reason, name)

    def _count(self, result: str, reason: str, name: str) -> None:
        self._loads.labels(result, reason).inc()
        self._tenant_loads.labels(self._tenant(tenant_of(name)), result).inc()

    def _tenant(self, tenant: str) -> str:
        """The label of a tenant, whose series are there from now on."""
        if tenant not in self._tenants:
            if len(self._tenants) >= MAX_TENANTS:
                tenant = OTHERS
            self._tenants.add(tenant)
            for result in ("accepted", "refused", "error"):
                self._tenant_loads.labels(tenant, result)
        return tenant

    def expose(self) -> str:
        """The exposition text of the registry."""
        return generate_latest(self._registry).decode()
