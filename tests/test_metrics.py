"""Metrics through registry samples, and through prometheus_client's parser as a scraper sees them."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from safelora_vllm.errors import AdapterRefused, Reason
from safelora_vllm.gate.admit import Admission, Stages
from safelora_vllm.gate.metrics import MAX_TENANTS, OTHERS, GateMetrics
from safelora_vllm.gate.reason_codes import REFUSED
from safelora_vllm.integration.attestation import PoolState
from safelora_vllm.integration.server.adapter_series import MAX_ADAPTER_SERIES, ReportSeries
from safelora_vllm.integration.server.metrics import Kept, Known, expose, kept_of_tenants
from safelora_vllm.integration.server.published_copies import Copies
from safelora_vllm.integration.server.registry import Entry, Served
from safelora_vllm.integration.server.traffic import TrafficTable
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.placement import Placement
from safelora_vllm.report import ModuleReport, Report
from safelora_vllm.store import AdapterRecord, Version
from tests.test_report import REPORT

OF_THE_SERVER = (
    "safelora_workers_expected",
    "safelora_ready",
    "safelora_uploads_in_flight",
    "safelora_build_info",
)
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
    return parsed(expose(Known(entries=adapters, workers=workers, expected=2)))


def test_series_of_a_served_adapter() -> None:
    samples = scrape(served("tenant"), guarded=2)
    assert {key: value for key, value in samples.items() if key[0] not in OF_THE_SERVER} == {
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
        ("safelora_adapter_info", ("tenant", "d" * 64, "safe-lora", "enforce", "false", "", "1")): 1,
        ("safelora_workers", ("guarded",)): 2,
    }


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("of_all", [False, True])
def test_who_is_served_with_a_second_opinion(own: bool, of_all: bool) -> None:
    policy = dataclasses.replace(REPORT.policy, opinion=own)
    known = Known(entries=[entry(dataclasses.replace(REPORT, policy=policy).named("x"), 0.5)])
    copies = Copies(cast(Any, None), cast(Any, None), cast(Any, None), opinion_of_all=of_all)
    samples = parsed(expose(known, ReportSeries(copies.has_opinion)))
    (labels,) = (labels for name, labels in samples if name == "safelora_adapter_info")
    assert labels[4] == ("true" if own or of_all else "false")


def test_series_of_an_unloaded_adapter_disappear() -> None:
    adapters, reports = served("one", "two"), ReportSeries()
    labels = "kept"
    before = parsed(expose(Known(entries=adapters), reports))
    assert before["safelora_adapter_modules", ("one", labels)] == 2
    del adapters[0]
    after = parsed(expose(Known(entries=adapters), reports))
    assert after["safelora_adapter_modules", ("two", labels)] == 2
    assert not any("one" in values for _, values in after)


def test_two_scrapes_at_once_have_their_own_adapters() -> None:
    reports, adapters = ReportSeries(), served("one", "two")
    first = reports.expose(adapters[:1])
    text = next(first)
    other = "".join(reports.expose(adapters))
    text += "".join(first)
    assert '"one"' in text and '"two"' not in text and '"two"' in other


def test_a_new_version_has_new_series() -> None:
    reports, (old,) = ReportSeries(), served("one")
    expose(Known(entries=[old]), reports)
    assert old.version is not None
    new = dataclasses.replace(old, version=dataclasses.replace(old.version, version=2, load_seconds=3.0))
    samples = parsed(expose(Known(entries=[new]), reports))
    assert samples["safelora_adapter_load_seconds", ("one",)] == 3


def test_the_number_of_adapter_series_is_capped_but_all_are_counted() -> None:
    samples = scrape(served(*(f"a{i}" for i in range(MAX_ADAPTER_SERIES + 50))))
    assert samples["safelora_adapters", ()] == MAX_ADAPTER_SERIES + 50
    named = {labels[0] for name, labels in samples if name.startswith("safelora_adapter_")}
    assert named == {f"a{i}" for i in range(MAX_ADAPTER_SERIES)}


def test_no_adapters_and_adapters_without_figures() -> None:
    samples = {key: value for key, value in scrape([]).items() if key[0] not in OF_THE_SERVER}
    assert samples == {("safelora_adapters", ()): 0}
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


def test_a_gate_has_its_series_before_the_first_answer() -> None:
    """An increase in Prometheus misses what a series begins with."""
    registry = CollectorRegistry()
    metrics = GateMetrics(registry)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"safelora_{name}_total", labels)

    answers = [("accepted", ""), *(("refused", code) for code in REFUSED), ("error", "StoreUnavailable")]
    assert {value("loads", result=result, reason=reason) for result, reason in answers} == {0}
    assert value("tenant_loads", tenant="", result="refused") == 0
    metrics.record_error("StoreUnavailable", "acme/x")
    assert value("tenant_loads", tenant="acme", result="refused") == 0
    assert value("tenant_loads", tenant="acme", result="error") == 1


def test_series_of_tenants_are_bounded() -> None:
    kept = {f"t{n:04}": Kept(1, n) for n in range(MAX_TENANTS + 50)}
    samples = parsed(expose(Known(tenants=kept)))
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


def test_series_of_requests(tmp_path: Path) -> None:
    """Two API servers have one sum; what is removed ends; nothing grows without bound."""
    one, two = TrafficTable(tmp_path, max_rows=2), TrafficTable(tmp_path, max_rows=2)
    adapters = served("a", "b", "c")
    for table in (one, two):
        for name in ("a", "b", "c"):  # the third has no row left
            table.serve(name)
        for name in ("a", "b", "c", ""):
            table.began(name)
            table.prompt(name, 10)
            table.timed(name, 0.2, 0.02)
            table.ended(name, "stop", tokens=5)
        table.in_flight({"a": 1}, {"a": 2, "c": 1})
    two.ended("a", "unavailable")
    two.timed("a", 100.0, None)

    def samples() -> Samples:
        return parsed(expose(Known(entries=adapters, traffic=one.snapshot())))

    found = samples()
    assert found["safelora_adapter_requests_total", ("a", "stop")] == 2
    assert found["safelora_adapter_requests_total", ("a", "unavailable")] == 1
    assert found["safelora_adapter_requests_total", ("(others)", "stop")] == 2, "c"
    assert found["safelora_adapter_requests_total", ("", "stop")] == 2, "the model itself"
    assert found["safelora_adapter_prompt_tokens_total", ("a",)] == 20
    assert found["safelora_adapter_generation_tokens_total", ("a",)] == 10
    assert found["safelora_adapter_running_requests", ("a",)] == 2
    assert found["safelora_adapter_waiting_requests", ("a",)] == 4
    first = "safelora_adapter_time_to_first_token_seconds"
    assert [found[f"{first}_bucket", ("a", le)] for le in ("0.1", "0.3", "10.0", "+Inf")] == [0, 2, 2, 3]
    assert found[f"{first}_count", ("a",)] == 3
    assert found[f"{first}_sum", ("a",)] == pytest.approx(100.4)
    assert found["safelora_adapter_time_per_output_token_seconds_count", ("a",)] == 2
    snapshot = two.snapshot()
    assert (snapshot["a"].hour_requests, snapshot["a"].hour_tokens) == (3, 10)

    for table in (one, two):
        table.keep_only({"b", "c"})
        table.serve("c")
        table.ended("a", "stop")  # a late one counts for the others
        table.ended("c", "stop")
    del adapters[0]
    found = samples()
    assert not any("a" in values for _, values in found)
    assert found["safelora_adapter_requests_total", ("(others)", "stop")] == 4
    assert found["safelora_adapter_requests_total", ("c", "stop")] == 2
    two.close()
    assert samples()["safelora_adapter_requests_total", ("c", "stop")] == 1
    one.close()
    assert not list(tmp_path.iterdir())


def test_the_first_request_after_an_upload_is_counted_for_its_adapter(tmp_path: Path) -> None:
    """It may come to another API server, and before that has looked at its names again."""
    table = TrafficTable(tmp_path, max_rows=1)
    for name in ("new", "one too many"):
        table.began(name)
        table.ended(name, "stop", tokens=5)
    found = {name: row.requests["stop"] for name, row in table.snapshot().items() if row.last_use}
    assert found == {"new": 1, OTHERS: 1}
    table.close()


def test_the_traffic_of_one_adapter(tmp_path: Path) -> None:
    """As among all, without a look at all."""
    one, two = TrafficTable(tmp_path), TrafficTable(tmp_path)
    for table in (one, two):
        for name in ("a", "b"):
            table.serve(name)
            table.ended(name, "stop", 5)
    table.ended("", "stop", 7)
    whole = one.snapshot()
    assert one.of("a") == whole["a"] and one.of("none") is None
    assert whole["a"].requests["stop"] == 2 and one.of("") is None
    one.close()
    two.close()


def test_a_full_disk_stops_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    table = TrafficTable(tmp_path)
    table.ended("", "stop")
    assert table.snapshot()[""].requests["stop"] == 1
    assert not list(tmp_path.iterdir())
    table.close()


def test_requests_of_the_last_hour(tmp_path: Path) -> None:
    table, now = TrafficTable(tmp_path), time.time()
    for ago in (7300, 3700, 3000, 10):
        table.ended("", "stop", tokens=1, now=now - ago)
    found = table.snapshot()[""]
    assert (found.hour_requests, found.hour_tokens, found.requests["stop"]) == (2, 2, 4)


def test_what_engines_have_loaded() -> None:
    """Two engines of two ranks each. A rank that is behind does not have the adapter loaded."""
    adapters = served("a", "b")
    for number, entry in enumerate(adapters):
        object.__setattr__(entry.served, "request", SimpleNamespace(lora_int_id=number))
    counts: dict[str, Any] = {
        "slots": 2,
        "capacity": 4,
        "load_counts": [1, 0, 0, 0, 0, 0, 1],
        "load_seconds": 2.0,
    }
    pools = [
        PoolState(0, device=[0, 1], host=[0, 1, 77], loads=2, device_evictions=3, **counts),
        PoolState(0, device=[0], host=[0, 1, 77], loads=1, step_loads=1, **counts),
        PoolState(1, host=[1], **counts),
        PoolState(1, host=[1], host_evictions=1, **counts),
    ]
    found = parsed(expose(Known(entries=adapters, pools=pools)))
    loaded = {labels for name, labels in found if name == "safelora_lora_adapter_loaded"}
    assert loaded == {
        ("a", "0", "gpu", "false", "8"), ("a", "0", "cpu", "false", "8"), ("b", "0", "cpu", "false", "8"),
        ("b", "1", "cpu", "false", "8"),
    }  # fmt: skip
    assert found["safelora_num_gpu_loaded_lora_adapters", ("0",)] == 2
    assert found["safelora_max_cpu_lora_adapters", ("1",)] == 4
    assert found["safelora_lora_loads_total", ("0", "request")] == 2
    assert found["safelora_lora_loads_total", ("0", "step")] == 1
    assert found["safelora_lora_evictions_total", ("0", "gpu")] == 3
    assert found["safelora_lora_evictions_total", ("1", "cpu")] == 1
    assert found["safelora_lora_adapter_load_seconds_bucket", ("0", "+Inf")] == 2
    assert found["safelora_lora_adapter_load_seconds_bucket", ("0", "1.0")] == 1


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
