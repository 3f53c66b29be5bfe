"""Prometheus metrics. Registries are passed in, never global.

`GateMetrics` counts what passes through one gate, in the gate's own process. `AdapterCollector`
builds the per-adapter series from the reports of what is served now, at each scrape: the series of
an adapter that was unloaded is simply not built any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from safelora_vllm.gate import Admission
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.report import Report
from safelora_vllm.store import Version

MAX_ADAPTER_SERIES = 500
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class GateMetrics:
    """Counters of one gate."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._loads = Counter(
            "safelora_loads",
            "Adapters judged by the gate; reason is the first refusal code, empty if accepted",
            ["result", "reason"],
            registry=registry,
        )
        self._stages = Histogram(
            "safelora_stage_seconds",
            "Seconds that one adapter spent in a stage of the gate",
            ["stage"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._cache = Counter(
            "safelora_gate_cache",
            "Whether an adapter had been published before under the same cache and policy",
            ["outcome"],
            registry=registry,
        )
        for outcome in ("hit", "miss"):
            self._cache.labels(outcome)  # there from the start, so that rates can be computed
        self._bytes = Gauge(
            "safelora_projector_bytes", "Bytes of projectors per tier", ["tier"], registry=registry
        )
        self._enforcing = Gauge(
            "safelora_enforcing", "1 if adapters are projected, 0 in audit mode", registry=registry
        )

    def describe(self, cache: ProjectorCache, enforcing: bool) -> None:
        """Set the gauges that do not change while the gate lives."""
        for tier, count in cache.resident_bytes().items():
            self._bytes.labels(tier).set(count)
        self._enforcing.set(enforcing)

    def record(self, admission: Admission) -> None:
        """Count one answer of the gate."""
        report = admission.report
        reason = "" if report.accepted else report.reasons[0].code
        self._loads.labels("accepted" if report.accepted else "refused", reason).inc()
        if report.digest:
            self._cache.labels("hit" if admission.cached else "miss").inc()
        for stage, seconds in admission.stages.seconds.items():
            self._stages.labels(stage).observe(seconds)

    def record_error(self, reason: str) -> None:
        """Count a load that failed without an answer, e.g. on a full disk."""
        self._loads.labels("error", reason).inc()

    def expose(self) -> str:
        """The exposition text of the registry."""
        return generate_latest(self._registry).decode()


@dataclass(frozen=True)
class ServedAdapter:
    """A served adapter's report and the seconds from its request to its being served.

    version: what the store has of it; None for an adapter that is not in the store.
    """

    report: Report
    load_seconds: float
    version: Version | None = None


class AdapterCollector(Collector):
    """Series of the adapters served now, and of the workers' states.

    At most ``MAX_ADAPTER_SERIES`` adapters get series, in the order of their loading;
    ``safelora_adapters`` always counts all of them.
    """

    def __init__(
        self,
        served: Callable[[], Sequence[ServedAdapter]],
        workers: Callable[[], dict[str, int]],
    ) -> None:
        self._served, self._workers = served, workers

    def collect(self) -> Iterator[Metric]:
        """Metric families of a snapshot (prometheus_client's custom collector interface)."""
        adapters = list(self._served())
        yield _gauge("adapters", "Adapters served now", [], [((), float(len(adapters)))])
        shown = adapters[:MAX_ADAPTER_SERIES]
        reports = [adapter.report for adapter in shown]
        yield _gauge(
            "adapter_modules",
            "Modules of a served adapter by decision",
            ["adapter", "decision"],
            [((r.adapter, d), r.count(d)) for r in reports for d in ("projected", "kept")],
        )
        for field, metric, what in (
            ("similarity", "similarity", "Cosine of projected and original delta over modules"),
            ("retained", "retained_norm", "Share of the delta's norm that is served, over modules"),
        ):
            yield _gauge(
                f"adapter_{metric}",
                what,
                ["adapter", "stat"],
                [
                    ((r.adapter, stat), value)
                    for r in reports
                    if (column := r.values(field))
                    for stat, value in (("min", min(column)), ("mean", sum(column) / len(column)))
                ],
            )
        yield _gauge(
            "adapter_relative_norm",
            "Largest norm of the uploaded delta relative to its weight over modules",
            ["adapter"],
            [((r.adapter,), max(r.values("relative_norm"), default=0.0)) for r in reports],
        )
        yield _gauge(
            "adapter_total_norm",
            "Norm of the uploaded delta relative to the weights of all modules together",
            ["adapter"],
            [((r.adapter,), r.total_norm) for r in reports],
        )
        yield _gauge(
            "adapter_load_seconds",
            "Seconds from the load request to the adapter being served",
            ["adapter"],
            [((adapter.report.adapter,), adapter.load_seconds) for adapter in shown],
        )
        yield _gauge(
            "adapter_info",
            "Content digest, method and mode of a served adapter",
            ["adapter", "digest", "method", "mode"],
            [((r.adapter, r.digest, r.policy.method, r.policy.mode), 1.0) for r in reports],
        )
        states = self._workers().items()
        yield _gauge("workers", "Workers by guard state", ["state"], [((s,), n) for s, n in states])

    def expose(self) -> str:
        """The exposition text of a snapshot."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry).decode()


def _gauge(
    name: str, what: str, labels: list[str], samples: list[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"safelora_{name}", what, labels=labels)
    for values, value in samples:
        family.add_metric(list(values), value)
    return family
