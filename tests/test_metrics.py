"""Metrics through registry samples, and through prometheus_client's parser as a scraper sees them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from safelora_vllm.errors import AdapterRefused, Reason
from safelora_vllm.gate.admit import Admission, Stages
from safelora_vllm.gate.metrics import MAX_TENANTS, OTHERS, GateMetrics
from safelora_vllm.integration.server.metrics import (
    MAX_ADAPTER_SERIES,
    AdapterCollector,
    Kept,
    kept_of_tenants,
)
from safelora_vllm.integration.server.registry import Entry, Served
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.placement import Placement
from safelora_vllm.report import ModuleReport, Report
from safelora_vllm.store import AdapterRecord, Version
from tests.test_report import REPORT

Samples = dict[tuple[str, tuple[str, ...]], float]


def parsed(text: str) -> Samples:
    """(metric, label values by name) → value, by prometheus_client's own parser; a repeat is an error."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.name.startswith("safelora_") and family.documentation
        for sample in family.samples:
            where = sample.name, tuple(value for _, value in sorted(sample.labels.items()))
            assert where not in samples
            samples[where] = sample.value
    return samples


def served(*names: str) -> list[Entry]:
    """Served adapters with one projected and two kept modules each."""
    more = ModuleReport("a.k_proj", 8, 0.75, 0.6, 1.0, 0.05, "kept")
    uncertain = dataclasses.replace(REPORT.modules[0], similarity_error=0.2, uncertain=True)
    report = dataclasses.replace(REPORT, modules=[uncertain, *REPORT.modules[1:], more])
    return [entry(report.named(name), 0.5) for name in names]


def entry(report: Report, seconds: float) -> Entry:
    """What the registry has of a served adapter."""
    version = Version(1, "d" * 64, 1, 8, 0.0, "ops", load_seconds=seconds)
    request: Any = None
    return Entry(report.adapter, 0, version, served=Served(request, report))


def scrape(adapters: list[Entry], **workers: int) -> Samples:
    """A scrape of these adapters."""
    return parsed(AdapterCollector(lambda: adapters, lambda: workers).expose())


def test_series_of_a_served_adapter() -> None:
    samples = scrape(served("tenant"), guarded=2)
    assert samples == {
        ("safelora_adapters", ()): 1,
        ("safelora_adapter_modules", ("tenant", "projected")): 1,
        ("safelora_adapter_modules", ("tenant", "kept")): 2,
        ("safelora_adapter_uncertain_modules", ("tenant",)): 1,
        ("safelora_adapter_similarity", ("tenant", "min")): 0.25,
        ("safelora_adapter_similarity", ("tenant", "mean")): 0.5,
        ("safelora_adapter_retained_norm", ("tenant", "min")): 0.01,
        ("safelora_adapter_retained_norm", ("tenant", "mean")): pytest.approx(0.505),
        ("safelora_adapter_relative_norm", ("tenant",)): 0.05,
        ("safelora_adapter_total_norm", ("tenant",)): 0.003,
        ("safelora_adapter_load_seconds", ("tenant",)): 0.5,
        ("safelora_adapter_info", ("tenant", "d" * 64, "safe-lora", "enforce")): 1,
        ("safelora_workers", ("guarded",)): 2,
    }


def test_series_of_an_unloaded_adapter_disappear() -> None:
    adapters = served("one", "two")
    collector = AdapterCollector(lambda: adapters, lambda: {"guarded": 1})
    registry = CollectorRegistry()
    registry.register(collector)
    labels = {"adapter": "one", "decision": "kept"}
    assert registry.get_sample_value("safelora_adapter_modules", labels) == 2
    del adapters[0]
    assert registry.get_sample_value("safelora_adapter_modules", labels) is None
    assert registry.get_sample_value("safelora_adapter_modules", {**labels, "adapter": "two"}) == 2
    assert "one" not in collector.expose()


def test_the_number_of_adapter_series_is_capped_but_all_are_counted() -> None:
    samples = scrape(served(*(f"a{i}" for i in range(MAX_ADAPTER_SERIES + 50))))
    assert samples["safelora_adapters", ()] == MAX_ADAPTER_SERIES + 50
    named = {labels[0] for name, labels in samples if name.startswith("safelora_adapter_")}
    assert named == {f"a{i}" for i in range(MAX_ADAPTER_SERIES)}


def test_no_adapters_and_adapters_without_figures() -> None:
    assert scrape([]) == {("safelora_adapters", ()): 0}
    empty = dataclasses.replace(REPORT, modules=REPORT.modules[1:])  # a delta of zero
    names = {name for name, _ in scrape([entry(empty, 0.1)])}
    assert "safelora_adapter_similarity" not in names and "safelora_adapter_modules" in names


def test_a_name_with_quotes_and_newlines_survives_the_exposition() -> None:
    assert ("safelora_adapter_relative_norm", ('a"b\n\\c',)) in scrape(served('a"b\n\\c'))


def test_a_gate_counts_its_answers() -> None:
    registry = CollectorRegistry()
    metrics = GateMetrics(registry)
    stages = Stages({"read": 0.002, "project": 0.2})
    causes = AdapterRefused([Reason("dora", "…"), Reason("bias", "…")])
    refused = Report.refused("x", "", "c", Policy(method="safe-lora"), causes)
    metrics.record(Admission(REPORT, "k", None, False, stages))
    metrics.record(Admission(REPORT, "k", None, True, Stages({"read": 0.004})))
    metrics.record(Admission(refused, None, None, False, Stages()))
    metrics.record_error("StoreUnavailable")

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"safelora_{name}", labels)

    assert value("loads_total", result="accepted", reason="") == 2
    assert value("loads_total", result="refused", reason="dora") == 1
    assert value("loads_total", result="error", reason="StoreUnavailable") == 1
    assert value("gate_cache_total", outcome="hit") == 1 == value("gate_cache_total", outcome="miss")
    assert value("stage_seconds_count", stage="read") == 2
    assert value("stage_seconds_sum", stage="read") == pytest.approx(0.006)
    assert value("stage_seconds_bucket", stage="project", le="0.1") == 0
    assert value("stage_seconds_bucket", stage="project", le="0.3") == 1
    assert parsed(metrics.expose())["safelora_loads_total", ("", "accepted")] == 2


def test_series_of_tenants_are_bounded() -> None:
    kept = {f"t{n:04}": Kept(1, n) for n in range(MAX_TENANTS + 50)}
    samples = parsed(AdapterCollector(list, dict, lambda: kept).expose())
    sizes = {labels[0]: value for (name, labels), value in samples.items() if name == "safelora_tenant_bytes"}
    assert len(sizes) == MAX_TENANTS + 1 and sum(sizes.values()) == sum(range(MAX_TENANTS + 50))
    assert sizes[OTHERS] == sum(range(50)) and samples["safelora_tenant_adapters", (OTHERS,)] == 50
    registry = CollectorRegistry()
    metrics = GateMetrics(registry)
    for name in ("shared", *(f"t{n}/x" for n in range(MAX_TENANTS + 50)), "t0/y"):
        metrics.record(Admission(REPORT.named(name), "k", None, False, Stages()))
    metrics.record_error("StoreUnavailable", "t1/x")

    def loads(tenant: str, result: str = "accepted") -> float | None:
        labels = {"tenant": tenant, "result": result}
        return registry.get_sample_value("safelora_tenant_loads_total", labels)

    assert (loads(""), loads("t0"), loads("t1", "error"), loads(OTHERS)) == (1, 2, 1, 51)
    assert loads("t240") is None


def test_what_the_store_keeps_of_tenants() -> None:
    version = Version(1, "a" * 64, 10, 4, 0.0, "ops")
    other = dataclasses.replace(version, digest="b" * 64)
    records = {
        "a/x": AdapterRecord("a/x", 2, (version, dataclasses.replace(other, version=2))),
        "a/y": AdapterRecord("a/y", 1, (version,)),
        "b": AdapterRecord("b", 1, (version,)),
    }
    assert kept_of_tenants(records) == {"": Kept(1, 10), "a": Kept(2, 20)}


def test_a_gate_describes_its_projectors(cache: ProjectorCache) -> None:
    registry = CollectorRegistry()
    metrics = GateMetrics(registry)
    loaded = ProjectorCache(cache.folder)
    names = [*loaded.modules]
    placement = Placement(9, 8, 7, 6, 5, 0, frozenset(names[:3]), frozenset(names[3:5]))
    loaded.load("cpu", placement)
    metrics.describe(loaded, placement, enforcing=True)
    metrics.describe(loaded, placement, enforcing=False)  # says it anew, and adds nothing up
    assert loaded.resident_bytes().keys() == {"device", "host", "disk"}
    for tier, count in loaded.resident_bytes().items():
        assert registry.get_sample_value("safelora_projector_bytes", {"tier": tier}) == count > 0
    assert registry.get_sample_value("safelora_gate_memory_budget_bytes") == 9
    assert registry.get_sample_value("safelora_gate_memory_transient_bytes") == 5
    assert registry.get_sample_value("safelora_enforcing") == 0
