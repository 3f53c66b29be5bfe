"""The sums of a plan, the GPU that is meant, and the time of a build, each from figures that are set."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import safelora_vllm as sl
from safelora_vllm.api import opened, planning
from safelora_vllm.errors import CheckpointError, PolicyError, ProjectorCacheError, UsageError
from safelora_vllm.projectors import assumed_spectrum, build_time
from safelora_vllm.projectors.build import BuildOptions
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.placement import Placement
from safelora_vllm.projectors.plan import Plan
from safelora_vllm.projectors.projector import Parts
from safelora_vllm.projectors.sizes import CacheBytes, groups_of_cache, total
from tests.tiny import Pair, write_checkpoint

MIB = 1024**2
PLACED = Placement(
    budget=1000, device_bytes=240, host_bytes=3, disk_bytes=5, transient=256, passing=6,
    on_device=frozenset(), on_host=frozenset(),
)  # fmt: skip
PLAN = Plan(
    groups=(), assumed=True, max_energy=0.95, disk=CacheBytes(1, 2, 4, 8), held=CacheBytes(16, 32, 64, 128),
    disk_at_most=0, held_at_most=0, lora_rank=16, adapter_uploaded=0, adapter_served=0, placement=PLACED,
    least_bytes=300, on_gpu=False, gpu_memory=None, weight_bytes=1000 * MIB, build_device="cpu",
    build_seconds=1.0,
)  # fmt: skip


def on_gpu(memory: int | None, **changes: Any) -> Plan:
    """The shares of energy are in host memory then."""
    placed = dataclasses.replace(PLACED, device_bytes=112)
    return dataclasses.replace(PLAN, on_gpu=True, placement=placed, gpu_memory=memory, **changes)


def test_sums_of_parts() -> None:
    assert (PLAN.disk.total, PLAN.held.total) == (15, 240)
    assert PLAN.disk + PLAN.held == CacheBytes(17, 34, 68, 136)
    assert total([PLAN.disk, PLAN.held, PLAN.disk]) == CacheBytes(18, 36, 72, 144)
    assert total([]) == CacheBytes()


def test_what_a_gate_takes_of_its_device() -> None:
    """As much as its placement says, and CUDA's context on a GPU. Host memory and disk are not its device."""
    assert PLAN.transient_bytes == 256
    assert (PLAN.device_bytes, PLAN.context_bytes, PLAN.gate_bytes) == (240, 0, 496)
    gpu = on_gpu(10**10)
    assert (gpu.device_bytes, gpu.context_bytes) == (112, 1200 * MIB)
    assert gpu.gate_bytes == 112 + 256 + 1200 * MIB
    assert gpu.gpu_share == gpu.gate_bytes / 10**10
    assert (PLAN.gpu_share, PLAN.gpus, PLAN.fits) == (None, None, None)
    assert (on_gpu(None).gpu_share, on_gpu(None).gpus, on_gpu(None).fits) == (None, None, None)


@pytest.mark.parametrize(
    ("memory", "gpus"),
    [(1000 * MIB, 1), (1000 * MIB - 1, 2), (500 * MIB, 2), (500 * MIB - 1, 3), (10**12, 1)],
)
def test_the_fewest_gpus(memory: int, gpus: int) -> None:
    assert on_gpu(memory).gpus == gpus


def test_a_gate_fits_up_to_the_last_byte() -> None:
    """Of 6,000 MiB of weights a half on each of two GPUs, beside the gate."""
    gate = on_gpu(1).gate_bytes
    for memory, fits in ((gate + 3000 * MIB, True), (gate + 3000 * MIB - 1, False)):
        plan = on_gpu(memory, weight_bytes=6000 * MIB)
        assert (plan.gpus, plan.fits) == (2, fits)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_rank": 0}, "`lora_rank` is 0: expected 1 or more"),
        ({"gpu_memory": 0}, "`gpu_memory` is 0: expected 1 or more"),
        ({"gpu_memory": -1}, "`gpu_memory` is -1: expected 1 or more"),
        *(
            ({"projectors": "none", name: value}, "`modules`, `max_energy` and `exact` have no effect with")
            for name, value in (("modules", ["q_proj"]), ("max_energy", 0.9), ("exact", True))
        ),
        ({"policy": sl.Policy(number=3)}, "`number` has no effect with `select` 'all'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_arguments_that_cannot_be(changes: dict[str, Any], told: str, pair: Pair) -> None:
    with pytest.raises(UsageError, match=told):
        sl.plan_projectors(pair.aligned, **changes)


def test_the_smallest_arguments(pair: Pair) -> None:
    plan = sl.plan_projectors(pair.aligned, lora_rank=1, gpu_memory=1)
    assert (plan.lora_rank, plan.gpu_memory, plan.on_gpu, plan.fits) == (1, 1, True, False)


def test_the_plan_of_a_thin_cache_for_a_policy_that_multiplies_by_an_operator(
    thin: ProjectorCache, cache: ProjectorCache, pair: Pair
) -> None:
    """All of L in the place of Ĉ and V; with an exact cache these and no L."""
    policy = sl.Policy(method="safe-lora")
    found, exact = (sl.plan_projectors(pair.aligned, policy, projectors=kind) for kind in (thin, cache))
    outputs = sum(
        4 * shape[0] * columns for group in found.groups for columns in group.kept for shape in [group.shape]
    )
    assert (found.held.operator, found.held.input_basis, found.held.output_basis) == (0, 0, outputs)
    assert found.disk.operator == 0 < exact.disk.operator == exact.held.operator
    assert exact.held.output_basis == exact.held.input_basis == 0
    assert found.least_bytes == found.placement.budget


def test_a_cache_with_a_module_in_another_shape_is_another_models(
    cache: ProjectorCache, pair: Pair, tmp_path: Path
) -> None:
    state = dict(pair.after)
    name = "model.layers.1.mlp.up_proj"
    state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
    folder = write_checkpoint(tmp_path / "model", state)
    with pytest.raises(ProjectorCacheError, match=rf"it has {name} as \(\d+, \d+\), .* has {name} as \(\d+"):
        sl.plan_projectors(folder, projectors=cache)
    state.pop(f"{name}.weight")
    folder = write_checkpoint(tmp_path / "less", state)
    with pytest.raises(ProjectorCacheError, match=f"has no linear layer {name}"):
        sl.plan_projectors(folder, projectors=cache)


def test_a_quantised_module_is_told_before_a_build(pair: Pair, tmp_path: Path) -> None:
    state = dict(pair.after)
    name = "model.layers.1.mlp.up_proj.weight"
    state[name] = state[name].to(torch.int8)
    with pytest.raises(CheckpointError, match=rf"{name} in .* is I8; expected one of"):
        sl.plan_projectors(write_checkpoint(tmp_path / "model", state))


def test_a_cache_without_modules_has_no_plan() -> None:
    empty: Any = SimpleNamespace(modules={}, folder="folder")
    with pytest.raises(ProjectorCacheError, match="folder has no modules; build it again"):
        groups_of_cache(empty, Parts())


@pytest.mark.parametrize(
    ("policy", "energy", "max_energy", "fits"),
    [
        (sl.Policy(energy=0.5), 0.5, 0.5, True),
        (sl.Policy(energy=0.5), 0.5, 0.499999, False),
        (sl.Policy(method="csulora", energy=0.5), 0.5, 0.4, False),
    ],
)
def test_no_policy_has_more_energy_than_its_build(
    policy: sl.Policy, energy: float, max_energy: float, fits: bool, pair: Pair
) -> None:
    if fits:
        assert sl.plan_projectors(pair.aligned, policy, max_energy=max_energy).max_energy == max_energy
        return
    with pytest.raises(PolicyError, match=f"`energy` {energy:g} is above the `max_energy`"):
        sl.plan_projectors(pair.aligned, policy, max_energy=max_energy)


@pytest.mark.parametrize(("device", "asked"), [("cpu", 0), ("cuda:1", torch.device("cuda:1"))])
def test_the_gpu_that_is_meant_or_seen(device: str, asked: object, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def properties(which: object) -> SimpleNamespace:
        seen.append(which)
        return SimpleNamespace(total_memory=7)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert planning._gpu_memory(device) is None and seen == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert planning._gpu_memory(device) == 7 and seen == [asked]


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, NotImplementedError])
def test_a_device_that_torch_cannot_use(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(UsageError, match="torch cannot use the `device` 'x' here; try cpu"):
        opened.usable_device("x")


def test_a_module_is_built_twice_and_the_faster_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one loads libraries."""
    clock, built = iter([0.0, 5.0, 10.0, 12.0]), []
    monkeypatch.setattr(build_time, "build_module", lambda *given: built.append(given[3]))
    monkeypatch.setattr(build_time, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    options = BuildOptions(max_energy=0.5)
    assert build_time._module_seconds(8, options) == 2.0
    assert built == [options] * 2


def test_what_is_hashed_is_timed_by_16_mib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_time, "_hash_seconds", lambda: 0.5)
    sides: list[int] = []
    monkeypatch.setattr(build_time, "_module_seconds", lambda side, *_: sides.append(side) or 0.0)
    shapes = {(2000, 3000): 4, (10, 20): 5}
    thin, exact = BuildOptions(), BuildOptions(exact=True)
    assert build_time.estimated_seconds(shapes, 32 * MIB, thin) == 1.0
    for options in (thin, exact, BuildOptions(device="cuda"), BuildOptions(device="cuda", exact=True)):
        build_time.estimated_seconds({(9000, 9000): 5}, 0, options)
    build_time.estimated_seconds({(10, 20): 5}, 0, exact)
    assert sides == [2000, 2048, 1024, 4096, 4096, 10], "no larger than a module of the model"


def test_every_module_counts_by_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_time, "_module_seconds", lambda side, *_: 2.0 * side**3)
    shapes = {(100, 300): 4, (300, 100): 1}
    assert build_time.estimated_seconds(shapes, 0, BuildOptions()) == pytest.approx(5 * 100**2 * 400)


def test_hashing_takes_time() -> None:
    assert time.get_clock_info("perf_counter").monotonic
    assert 0.0 < build_time._hash_seconds() < 60.0


@pytest.mark.parametrize(("energy", "k"), [(0.0, 0), (-1.0, 0), (1.0, 64), (2.0, 64), (1e-9, 1)])
def test_the_ends_of_the_assumed_directions(energy: float, k: int) -> None:
    assert assumed_spectrum.directions((64, 96), energy) == k


def test_assumed_directions_rise_with_the_energy_and_are_never_above_its_share() -> None:
    found = [assumed_spectrum.directions((64, 96), step / 50) for step in range(51)]
    assert found == sorted(found)
    assert all(k <= -(-64 * step // 50) for step, k in enumerate(found))
    assert assumed_spectrum.directions((64, 96), 0.5) < 32
