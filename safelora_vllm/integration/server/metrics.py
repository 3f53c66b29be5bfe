"""Prometheus series of the adapters that are served, built at each scrape from their reports.

The series of an adapter that was unloaded is not built any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from safelora_vllm.errors import SafeLoRAError
from safelora_vllm.gate.metrics import MAX_TENANTS, OTHERS
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.store import AdapterRecord
from safelora_vllm.store.serving import tenant_of
from safelora_vllm.tenants.quotas import content_sizes

if TYPE_CHECKING:
    from safelora_vllm.integration.server.reconcile import Reconciler

logger = logging.getLogger("vllm.safelora.metrics")
MAX_ADAPTER_SERIES = 500


class AdapterCollector(Collector):
    """Series of the registry's adapters that are served now, and of the workers' states.

    At most ``MAX_ADAPTER_SERIES`` adapters get series, in the order of their loading;
    ``safelora_adapters`` always counts all of them. tenants: what the store keeps of each, of at most
    ``MAX_TENANTS`` by itself.
    """

    def __init__(
        self,
        entries: Callable[[], Sequence[Entry]],
        workers: Callable[[], dict[str, int]],
        tenants: Callable[[], Mapping[str, Kept]] = dict,
    ) -> None:
        self._entries, self._workers, self._tenants = entries, workers, tenants

    def collect(self) -> Iterator[Metric]:
        """Metric families of a snapshot (prometheus_client's custom collector interface)."""
        adapters = [(entry.served.report, entry.load_seconds) for entry in self._entries() if entry.served]
        yield _gauge("adapters", "Adapters served now", [], [((), float(len(adapters)))])
        shown = adapters[:MAX_ADAPTER_SERIES]
        reports = [report for report, _ in shown]
        yield _gauge(
            "adapter_modules",
            "Modules of a served adapter by decision",
            ["adapter", "decision"],
            [((r.adapter, d), r.count(d)) for r in reports for d in ("projected", "kept")],
        )
        yield _gauge(
            "adapter_uncertain_modules",
            "Modules of a served adapter that are projected because a thin projector cache leaves open "
            "whether the policy selects them",
            ["adapter"],
            [((r.adapter,), float(r.uncertain)) for r in reports],
        )
        for field, metric, what in (
            (
                "similarity",
                "similarity",
                "Cosine similarity of the projected and the original delta, over modules",
            ),
            (
                "retained",
                "retained_norm",
                "Norm of the served delta as a share of that of the uploaded delta, over modules",
            ),
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
            "Norm of the uploaded delta relative to the module's weight, largest of the modules",
            ["adapter"],
            [((r.adapter,), max(r.values("relative_norm"), default=0.0)) for r in reports],
        )
        yield _gauge(
            "adapter_total_norm",
            "Norm of the uploaded delta relative to the weights of all cached modules together",
            ["adapter"],
            [((r.adapter,), r.total_norm) for r in reports],
        )
        yield _gauge(
            "adapter_load_seconds",
            "Seconds from the load request to the adapter being served",
            ["adapter"],
            [((report.adapter,), seconds) for report, seconds in shown],
        )
        yield _gauge(
            "adapter_info",
            "Content digest, method and mode of a served adapter",
            ["adapter", "digest", "method", "mode"],
            [((r.adapter, r.digest, r.policy.method, r.policy.mode), 1.0) for r in reports],
        )
        kept = _bounded(self._tenants())
        for field, what in (
            ("adapters", "Names of a tenant in the store, served or not"),
            ("bytes", "Bytes of a tenant's uploads in the store, as its quota counts them"),
        ):
            values = {tenant: float(getattr(found, field)) for tenant, found in kept.items()}
            yield _gauge(f"tenant_{field}", what, ["tenant"], [((t,), value) for t, value in values.items()])
        states = self._workers().items()
        yield _gauge("workers", "Workers by guard state", ["state"], [((s,), n) for s, n in states])

    def expose(self) -> str:
        """The exposition text of a snapshot."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry).decode()


class Kept(NamedTuple):
    """What the store keeps of a tenant."""

    adapters: int = 0
    bytes: int = 0


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


def exposition(reconciler: Reconciler) -> str:
    """Exposition text: the served adapters and, unless it is down, the gate's counters. Waits for it."""
    entries, workers = reconciler.registry.values(), reconciler.watchdog.workers
    try:
        counters = reconciler.copies.gate.metrics(timeout=5.0)
    except SafeLoRAError as error:
        logger.warning("no gate metrics: %s", error)
        counters = ""
    try:
        kept = kept_of_tenants(reconciler.names.all())
    except SafeLoRAError as error:
        logger.warning("no metrics of tenants: %s", error)
        kept = {}
    return counters + AdapterCollector(lambda: list(entries), lambda: workers, lambda: kept).expose()


def _gauge(
    name: str, what: str, labels: list[str], samples: list[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"safelora_{name}", what, labels=labels)
    for values, value in samples:
        family.add_metric(list(values), value)
    return family
