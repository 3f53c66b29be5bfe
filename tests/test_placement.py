"""The gate's memory budget: where projectors are in it, that no answer depends on it, what goes back."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import safelora_vllm as sl
from safelora_vllm.errors import UsageError
from safelora_vllm.gate.memory import (
    _LIBRARY_BYTES,
    Allocator,
    allocator_of,
    demand_of,
    give_back,
    placed,
)
from safelora_vllm.gate.protocol import Admit, GateConfig, GetMetrics, Metrics
from safelora_vllm.gate.service import GateService
from safelora_vllm.methods.judge import working_bytes
from safelora_vllm.methods.reads import parts_read
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.placement import Demand, Placement, pinned_bytes, place
from safelora_vllm.projectors.sizes import groups_of_cache
from safelora_vllm.settings import ServerSettings
from tests.test_gate_service import with_settings
from tests.tiny import Draft, Pair

CPU = torch.device("cpu")
DEMAND = Demand(bases=100, operators={"large": 40, "small": 10, "middle": 20, "twin": 20}, working=7)
SAFE_LORA = Policy(method="safe-lora")
# Each reads Ĉ or V: once, once for a decision and for the projection, and for all modules before any.
READERS = (SAFE_LORA, Policy(select="threshold"), Policy(method="safe-lora", select="number", number=5))


# The arithmetic.


@pytest.mark.parametrize(
    ("budget", "host", "on_device", "on_host", "transient"),
    [
        (None, 0, {"large", "small", "middle", "twin"}, set(), 7),
        (197, 0, {"large", "small", "middle", "twin"}, set(), 7),
        (1000, 500, {"large", "small", "middle", "twin"}, set(), 7),
        (196, 0, set(), set(), 87),  # 80 of it for two of the largest
        (187, 0, set(), set(), 87),
        (187, 15, set(), set(), 87),  # a pinned tensor of 10 bytes takes 16
        (187, 16, set(), {"small"}, 87),
        (187, 79, set(), {"small", "middle"}, 87),
        (187, 80, set(), {"small", "middle", "twin"}, 87),
        (187, 144, set(), {"small", "middle", "twin", "large"}, 87),
    ],
)
def test_a_placement(
    budget: int | None, host: int, on_device: set[str], on_host: set[str], transient: int
) -> None:
    found = place(DEMAND, budget, host)
    assert (found.on_device, found.on_host, found.transient) == (on_device, on_host, transient)
    assert found.budget == (197 if budget is None else budget)
    assert found.device_bytes == 100 + sum(DEMAND.operators[name] for name in on_device)
    assert found.host_bytes == sum(DEMAND.operators[name] for name in on_host)
    assert found.disk_bytes == 90 - (found.device_bytes - 100) - found.host_bytes


def test_small_operators_come_first() -> None:
    """On the device, then in host memory. As soon as one is not on the device, both buffers are needed."""
    demand = dataclasses.replace(DEMAND, operators={**DEMAND.operators, "other": 40, "third": 40})
    assert demand.least == 187 and demand.whole == 277
    found = place(demand, 187 + 49, 128)
    assert found.on_device == {"small", "middle"} and found.on_host == {"twin", "large"}
    assert place(demand, 187 + 50).on_device == {"small", "middle", "twin"}
    assert place(demand, 276).on_device == {"small", "middle", "twin"}
    assert place(demand, 277).passing == 0


@given(
    st.integers(0, 1000),
    st.lists(st.integers(1, 500), max_size=8),
    st.integers(0, 300),
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.integers(0, 50),
)
def test_a_budget_holds_or_is_refused_with_the_one_that_is_needed(
    bases: int, sizes: list[int], working: int, budget: int, host: int, shares: int
) -> None:
    demand = Demand(bases, {str(i): size for i, size in enumerate(sizes)}, working, shares)
    try:
        found = place(demand, budget, host)
    except UsageError as error:
        assert budget < demand.least and f"expected {demand.least:,} or more" in str(error)
        found = place(demand, demand.least, host)
    assert found.device_bytes + found.transient <= found.budget
    assert found.device_bytes + found.host_bytes + found.disk_bytes == bases + shares + sum(sizes)
    assert sum(pinned_bytes(demand.operators[name]) for name in found.on_host) <= host
    assert not found.on_device & found.on_host
    spilled = found.host_bytes + found.disk_bytes
    assert found.passing == (2 * max(sizes) if spilled else 0) and demand.least <= demand.whole


def test_a_pinned_tensor_takes_a_power_of_two() -> None:
    assert [pinned_bytes(n) for n in (0, 1, 2, 3, 4, 5, 2**25, 2**25 + 1)] == [0, 1, 2, 4, 4, 8, 2**25, 2**26]


def test_too_little_is_refused_with_what_is_needed_and_what_lowers_it() -> None:
    with pytest.raises(UsageError) as refused:
        place(DEMAND, 186)
    assert str(refused.value) == (
        "`projector_memory` is 186 bytes: expected 187 or more (100 for R, L and the shares of energy of all "
        "modules; 80 for Ĉ or V of the largest modules; 7 for the work of an adapter). Less is needed with a "
        "smaller `energy` or a policy or a cache without Ĉ and V or adapters of a smaller largest rank, "
        "where that can be set; or use another device"
    )
    with pytest.raises(UsageError) as refused:
        place(Demand(0, {}, 7, shares=3), 0)
    assert "expected 10 or more (3 for R" in str(refused.value)
    assert "Ĉ" not in str(refused.value) and "`energy`" not in str(refused.value)


# The gate.


@pytest.fixture
def config(cache: ProjectorCache, tmp_path: Path) -> GateConfig:
    """Settings of a gate under Safe LoRA's own policy."""
    settings = ServerSettings(
        str(cache.folder), str(tmp_path / "store"), {"method": "safe-lora"}, trust_served_model=True
    )
    return GateConfig(str(tmp_path / "gate.sock"), "not compared", settings, dtype="bfloat16", max_rank=16)


def demand(cache: ProjectorCache, policy: Policy, max_rank: int = 16) -> Demand:
    """What the policy takes of a CPU."""
    return demand_of(groups_of_cache(cache, parts_read(policy, cache.thin)), policy, CPU, max_rank)


def published(service: GateService, adapter: Path, store: Path) -> dict[str, bytes]:
    """All files that an accepted adapter has in the store."""
    key = service.admit(Admit(str(adapter), "tenant")).accepted_key()
    folder = store / "published" / key
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("policy", READERS, ids=lambda p: p.summary)
def test_the_same_is_published_whatever_the_budget(
    policy: Policy, config: GateConfig, cache: ProjectorCache, tmp_path: Path
) -> None:
    adapter, needed = Draft().write(tmp_path / "adapter"), demand(cache, policy)
    middle = (needed.least + needed.whole) // 2
    assert needed.least < middle < needed.whole
    found = []
    for number, budget in enumerate((None, needed.whole, needed.whole - 1, middle, needed.least)):
        store = tmp_path / str(number)
        policies = {"method": policy.method, "select": policy.select, "number": policy.number}
        used = {name: value for name, value in policies.items() if policy.has_effect(name)}
        given = with_settings(config, projector_memory=budget, policy=used, store=str(store))
        service = GateService(given)
        held = service._settings.cache.resident_bytes()
        assert (held["disk"] > 0) == (budget not in (None, needed.whole)) and held["host"] == 0
        found.append(published(service, adapter, store))
    assert all(each == found[0] for each in found) and "adapter_model.safetensors" in found[0]


@pytest.mark.parametrize("policy", READERS, ids=lambda p: p.summary)
def test_host_memory_gives_the_same_answers(policy: Policy, cache: ProjectorCache, tmp_path: Path) -> None:
    """A CPU has no such memory of its own; its tensors pass through the same buffers."""
    needed, reports, adapter = demand(cache, policy), [], Draft().write(tmp_path / "adapter")
    for placement in (None, place(needed, needed.least, 30_000), place(needed, needed.least, 2**30)):
        opened = ProjectorCache(cache.folder)
        opened.load(CPU, placement, **dataclasses.asdict(parts_read(policy, cache.thin)))
        if placement:
            held = opened.resident_bytes()
            assert (held["device"], held["host"], held["disk"]) == (
                placement.device_bytes, placement.host_bytes, placement.disk_bytes,
            )  # fmt: skip
            assert placement.host_bytes > 0
        reports.append(sl.inspect_adapter(adapter, opened, policy))
    assert reports[0] == reports[1] == reports[2]


def test_too_small_a_budget_ends_the_start_with_the_number_that_is_needed(
    config: GateConfig, cache: ProjectorCache
) -> None:
    least = demand(cache, SAFE_LORA).least
    with pytest.raises(UsageError, match=rf"is {least - 1:,} bytes: expected {least:,} or more"):
        GateService(with_settings(config, projector_memory=least - 1))
    GateService(with_settings(config, projector_memory=least))


def test_a_gate_on_a_cpu_has_no_host_memory_of_its_own(config: GateConfig, cache: ProjectorCache) -> None:
    memory = {"projector_memory": demand(cache, SAFE_LORA).least, "projector_host_memory": 1}
    with pytest.raises(UsageError, match="`projector_host_memory` has no effect for a gate on a CPU"):
        GateService(with_settings(config, **memory))


@pytest.mark.parametrize("policy", [*READERS, Policy(), Policy(method="csulora")], ids=lambda p: p.summary)
@pytest.mark.parametrize("share", [None, 0.0, 0.4, 1.0])
def test_plan_says_what_the_gate_does(
    policy: Policy, share: float | None, cache: ProjectorCache, pair: Pair, config: GateConfig
) -> None:
    needed = demand(cache, policy)
    budget = None if share is None else int(needed.least + share * (needed.whole - needed.least))
    plan = sl.plan_projectors(pair.aligned, policy, projectors=cache, projector_memory=budget)
    fields = {name: getattr(policy, name) for name in ("method", "select", *policy.chosen)}
    service = GateService(with_settings(config, projector_memory=budget, policy=fields))
    assert plan.placement == service._placement and plan.least_bytes == needed.least
    held = service._settings.cache.resident_bytes()
    assert held == {"device": plan.device_bytes, "host": 0, "disk": plan.placement.disk_bytes}
    assert plan.device_bytes + plan.transient_bytes <= plan.placement.budget


def test_metrics_and_the_log_say_where_everything_is(
    config: GateConfig, cache: ProjectorCache, caplog: pytest.LogCaptureFixture
) -> None:
    needed = demand(cache, SAFE_LORA)
    with caplog.at_level(logging.INFO, "vllm.safelora"):
        service = GateService(with_settings(config, projector_memory=needed.least + 40_000))
    text, placement = service.answer(GetMetrics()), service._placement
    assert isinstance(text, Metrics) and placement.on_device and placement.disk_bytes
    samples = dict(line.split(" ") for line in text.text.splitlines() if line.startswith("safelora_"))
    assert {name: float(value) for name, value in samples.items() if "bytes" in name} == {
        'safelora_projector_bytes{tier="device"}': placement.device_bytes,
        'safelora_projector_bytes{tier="host"}': 0.0,
        'safelora_projector_bytes{tier="disk"}': placement.disk_bytes,
        "safelora_gate_memory_budget_bytes": needed.least + 40_000,
        "safelora_gate_memory_transient_bytes": placement.transient,
    }
    (line,) = [r.getMessage() for r in caplog.records if "projector memory" in r.getMessage()]
    sizes = [
        f"{n / 2**20:,.1f} MiB"
        for n in (placement.budget, placement.device_bytes, placement.transient, 0, placement.disk_bytes)
    ]
    assert line == (
        "projector memory on cpu: {}, of which projectors take {} and the work of an adapter up to {}; {} "
        "are in pinned host memory, {} are read from disk at each use"
    ).format(*sizes)


def test_the_shares_of_energy_stay_in_host_memory_beside_another_device(
    cache: ProjectorCache, pair: Pair
) -> None:
    groups = groups_of_cache(cache, parts_read(SAFE_LORA, cache.thin))
    on_cpu, elsewhere = (demand_of(groups, SAFE_LORA, torch.device(kind), 16) for kind in ("cpu", "meta"))
    assert on_cpu.shares > 0 == elsewhere.shares and on_cpu.operators == elsewhere.operators
    opened, placement = ProjectorCache(cache.folder), place(elsewhere)
    opened.load("meta", placement, **dataclasses.asdict(parts_read(SAFE_LORA, cache.thin)))
    assert opened.resident_bytes() == {"device": placement.device_bytes, "host": on_cpu.shares, "disk": 0}
    planned = sl.plan_projectors(pair.aligned, SAFE_LORA, projectors=cache, gpu_memory=2**30)
    assert planned.device_bytes == placement.device_bytes


def test_parts_that_the_policy_never_reads_are_nowhere(config: GateConfig) -> None:
    service = GateService(with_settings(config, policy={}))
    held = service._settings.cache.resident_bytes()
    assert held["device"] > 0 == held["disk"] == held["host"]


def test_the_work_is_that_of_the_worst_rank(cache: ProjectorCache) -> None:
    """Many modules of a small rank can take more than few of a large one."""
    groups = groups_of_cache(cache, parts_read(SAFE_LORA, cache.thin))
    shapes: dict[tuple[int, int], int] = {}
    for group in groups:
        shapes[group.shape] = shapes.get(group.shape, 0) + len(group.names)
    bases = dict.fromkeys(shapes, 0)
    works = [working_bytes(shapes, rank, SAFE_LORA, CPU, bases) for rank in range(1, 601)]
    for rank in (1, 16, 512, 600):
        found = demand_of(groups, SAFE_LORA, CPU, rank).working
        assert found == max(works[:rank]) + max(works[:rank]) // 8


DEMO = Path(__file__).parents[1] / ".cache"


@pytest.mark.skipif(not (DEMO / "projectors").exists(), reason="make models has not been run")
def test_plan_and_gate_agree_on_the_models_of_the_demo(tmp_path: Path) -> None:
    projectors, model, memory = str(DEMO / "projectors"), str(DEMO / "models" / "aligned"), 2**26
    settings = ServerSettings(
        projectors, str(tmp_path / "store"), {"method": "safe-lora"}, projector_memory=memory
    )
    service = GateService(GateConfig(str(tmp_path / "sock"), model, settings, max_rank=16))
    plan = sl.plan_projectors(model, SAFE_LORA, projectors=projectors, projector_memory=memory)
    assert plan.placement == service._placement and plan.modules == 210


# What goes back.


class Pool:
    """An allocator that keeps what was used."""

    def __init__(self, used: int, kept: int) -> None:
        self.used, self.kept = used, kept
        self.calls: list[str] = []

    def reserved(self) -> int:
        return self.used + self.kept

    def release(self) -> None:
        self.calls.append("release")
        self.kept = 0

    def take(self, nbytes: int) -> None:
        self.calls.append("take")
        self.kept += nbytes


def test_what_is_kept_beyond_the_budget_goes_back_and_the_work_has_its_memory() -> None:
    placement = place(DEMAND, 190)
    held = placement.device_bytes + placement.passing
    within = Pool(held, placement.budget + _LIBRARY_BYTES - held)
    allocator: Allocator = within
    give_back(allocator, placement)
    assert within.calls == []
    beyond = Pool(held, within.kept + 1)
    give_back(beyond, placement)
    assert beyond.calls == ["release", "take"]
    assert beyond.reserved() == placement.device_bytes + placement.transient <= placement.budget


def test_a_cpu_keeps_nothing() -> None:
    assert allocator_of(CPU) is None
    give_back(None, place(DEMAND))


@pytest.mark.parametrize("fails", [False, True])
def test_a_gate_gives_back_after_its_warm_up_and_after_each_adapter(
    fails: bool, config: GateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Placement] = []
    monkeypatch.setattr(
        "safelora_vllm.gate.service.give_back", lambda _allocator, placement: calls.append(placement)
    )
    service = GateService(config)
    assert calls == []  # a CPU is not warmed up
    if fails:
        (tmp_path / "adapter").mkdir()
    else:
        Draft().write(tmp_path / "adapter")
    service.admit(Admit(str(tmp_path / "adapter"), "tenant"))
    assert calls == [service._placement]
    monkeypatch.setattr("safelora_vllm.gate.service.warm_up", lambda *_: None)
    GateService(dataclasses.replace(config, device="meta"))
    assert len(calls) == 2


def test_a_policy_without_operators_has_no_buffers(cache: ProjectorCache) -> None:
    groups = groups_of_cache(cache, parts_read(Policy(), cache.thin))
    needed, placement = placed(groups, Policy(), CPU, 16)
    assert needed.operators == {} and needed.passing == 0 and needed.least == needed.whole == placement.budget
