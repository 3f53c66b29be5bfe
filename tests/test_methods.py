"""Figures, decisions and projected weights of every module against dense float64 matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safelora_vllm.errors import PolicyError
from safelora_vllm.gate.admit import GateSettings
from safelora_vllm.methods import METHODS, Method
from safelora_vllm.methods.calibration import calibrate
from safelora_vllm.methods.method import Option
from safelora_vllm.methods.selection import Interval
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import Parts, ProjectorCache
from safelora_vllm.store import PublishedStore
from tests import reference
from tests.module_delta import ModuleDelta
from tests.refusing import codes, judge
from tests.tiny import K0, Draft, Pair, key, lora, module_shapes

# A cosine's error is that of Ĉ B: up to 6e-8 per float32 value and 4e-3 per bfloat16 one, whose
# random signs average out over the values of Ĉ. That is why these modules are not smaller: on a
# 48-wide one bfloat16 was seen 1.0024e-3 off, on a 576-wide one 1.2e-4 at most.
TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3}
# A weight's or a norm's error is that of Ĉ and of B, each rounded once, not averaged.
WEIGHTS = {"float32": 2e-6, "bfloat16": 1e-2}
CACHES = [(dtype, form) for dtype in TOLERANCE for form in ("dense", "factored")]
RANK = 4


@pytest.fixture(params=CACHES, ids="-".join)
def form(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(dtype, form) of a cache."""
    return request.param


@pytest.fixture
def deltas(form: tuple[str, str], build_cache: Callable[[str, str], Path]) -> dict[str, ModuleDelta]:
    """An adapter on all modules next to its projectors."""
    return measured(ProjectorCache(build_cache(*form)), seed=7)


def measured(cache: ProjectorCache, seed: int) -> dict[str, ModuleDelta]:
    """Module name → the delta of a random adapter."""
    tensors = lora(seed=seed, rank=RANK)
    return {
        name: ModuleDelta(tensors[key(name, "A")], tensors[key(name, "B")], cache.projector(name))
        for name in module_shapes()
    }


def intervals(deltas: dict[str, ModuleDelta]) -> dict[str, Interval | None]:
    """What a policy selects by."""
    return {name: delta.stats(Parts()).similarity for name, delta in deltas.items()}


def test_figures_of_every_module(form: tuple[str, str], deltas: dict[str, ModuleDelta], pair: Pair) -> None:
    assert set(deltas) == set(module_shapes())
    for name, delta in deltas.items():
        a, b, v, w = delta.a, delta.b, pair.v(name), pair.w(name)
        entry = delta.projector.entry
        assert delta.similarity == pytest.approx(reference.similarity(v, a, b), abs=TOLERANCE[form[0]])
        assert delta.relative_norm == pytest.approx(
            reference.ratio(b.double() @ a.double(), w), rel=1e-12
        )  # float64 on both sides: it does not depend on the projector
        assert entry.null_similarity == pytest.approx(reference.null_similarity(v), rel=1e-12)
        assert entry.norm == pytest.approx(float(v.norm()), rel=1e-12)
        assert entry.aligned_norm == pytest.approx(float(w.norm()), rel=1e-12)
        assert (entry.shape, entry.form) == (module_shapes()[name], form[1])


def test_safe_lora_multiplies_b_by_the_operator(
    form: tuple[str, str], deltas: dict[str, ModuleDelta], pair: Pair
) -> None:
    for name, delta in deltas.items():
        a, b = METHODS["safe-lora"].project(delta, Policy(method="safe-lora"))
        expected = reference.projected(pair.v(name), delta.a, delta.b)
        assert reference.ratio(b.double() @ a.double() - expected, expected) < WEIGHTS[form[0]]
        original = delta.b.double() @ delta.a.double()
        assert delta.served(a, b).retained == pytest.approx(
            reference.ratio(expected, original), rel=WEIGHTS[form[0]]
        )


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9])
def test_input_removal_takes_the_dominant_inputs_from_a(
    energy: float, deltas: dict[str, ModuleDelta], pair: Pair
) -> None:
    policy = Policy(method="input-removal", energy=energy)
    for name, delta in deltas.items():
        a, b = METHODS["input-removal"].project(delta, policy)
        original = delta.b.double() @ delta.a.double()
        expected = reference.removed(pair.v(name), delta.a, delta.b, energy)
        assert (a.shape, b.shape) == (delta.a.shape, delta.b.shape)
        # The basis is float32 in every cache: 6e-8 per value, once in A R and once in (A R) Rᵀ.
        assert reference.ratio(b.double() @ a.double() - expected, original) < 2e-6
        assert delta.served(a, b).retained == pytest.approx(reference.ratio(expected, original), abs=2e-6)
        assert delta.served(a, b).coherence >= 1 / RANK  # singular vectors do not cancel


def test_no_energy_takes_nothing(deltas: dict[str, ModuleDelta]) -> None:
    delta = next(iter(deltas.values()))
    a, b = METHODS["input-removal"].project(delta, Policy(method="input-removal", energy=0.0))
    original = delta.b.double() @ delta.a.double()
    assert reference.ratio(b.double() @ a.double() - original, original) < 2e-7


def test_what_is_removed_does_not_come_back_by_rounding(deltas: dict[str, ModuleDelta]) -> None:
    """Two large ranks that differ by what alignment reads, each of which would round to itself again."""
    projector = next(iter(deltas.values())).projector
    inputs = projector.input_basis(0.3).double()
    read, generator = inputs[:, 0], torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, read.shape, generator=generator).double() * 2 - 1
    carrier = 1.06 * 2.0 ** torch.ceil(torch.log2(1.15 * read.abs()) + 8) * signs
    carrier -= inputs @ (inputs.T @ carrier)
    a = torch.stack([carrier + read, carrier - read]).bfloat16()
    b = torch.randn(projector.entry.shape[0], 1, generator=generator) * torch.tensor([[1.0, -1.0]])
    delta = ModuleDelta(a.float(), b, projector, torch.bfloat16)
    alone = delta.rounded(delta.a - ((delta.a.double() @ inputs) @ inputs.T))
    new_a, new_b = METHODS["input-removal"].project(delta, Policy(method="input-removal", energy=0.3))

    def leak(a: torch.Tensor, b: torch.Tensor) -> float:
        original = delta.b.double() @ delta.a.double()
        return reference.ratio(b.double() @ a.double() @ inputs, original @ inputs)

    assert leak(alone, delta.b) > 0.15 and leak(new_a, new_b) < 0.01


@pytest.mark.parametrize("method", [name for name in METHODS if Policy(method=name).has_effect("energy")])
def test_more_energy_than_the_cache_keeps_is_refused(method: str, deltas: dict[str, ModuleDelta]) -> None:
    with pytest.raises(PolicyError, match=r"`energy` 0\.99 is above .* a `max_energy` of 0\.99"):
        METHODS[method].project(next(iter(deltas.values())), Policy(method=method, energy=0.99))


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95])
def test_csulora_damps_what_is_not_in_both_bases(
    energy: float, deltas: dict[str, ModuleDelta], pair: Pair
) -> None:
    policy = Policy(method="csulora", energy=energy)
    for name, delta in deltas.items():
        a, b = METHODS["csulora"].project(delta, policy)
        assert (a.shape, b.shape) == (delta.a.shape, delta.b.shape)
        whole = reference.damped(pair.v(name), delta.a, delta.b, energy)
        expected, found = reference.truncated(whole, RANK), b.double() @ a.double()
        original = delta.b.double() @ delta.a.double()
        # The bases and what is served are float32, 6e-8 per value. A small gap between the last singular
        # value that is kept and the first that is not makes it more: 3e-7 was seen.
        assert reference.ratio(found - expected, original) < 2e-6
        # In the distance to the nearest matrix such errors are squared.
        assert reference.ratio(found - whole, original) == pytest.approx(
            reference.ratio(expected - whole, original), abs=1e-9
        )
        served = delta.served(a, b)
        assert served.retained == pytest.approx(reference.ratio(expected, original), abs=2e-6)
        assert served.coherence >= 1 / RANK  # singular vectors do not cancel


def test_csulora_keeps_one_block_whole_and_damps_a_lonely_other_one_to_a_21st(
    cache: ProjectorCache, pair: Pair
) -> None:
    """λ = E/(0 + 0.05 E) = 20 where all of the delta is in one of the three."""
    policy = Policy(method="csulora", energy=0.6)
    left, right = reference.bases(pair.v(K0), policy.energy)
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(RANK, 96, generator=generator).double()
    b = torch.randn(32, RANK, generator=generator).double()
    sides_a = {True: a @ right @ right.T, False: a - a @ right @ right.T}
    sides_b = {True: left @ left.T @ b, False: b - left @ left.T @ b}
    for output, side_b in sides_b.items():
        for input_, side_a in sides_a.items():
            delta = ModuleDelta(side_a, side_b, cache.projector(K0))
            new_a, new_b = METHODS["csulora"].project(delta, policy)
            gamma = 1.0 if output and input_ else 1 / 21
            original = delta.b.double() @ delta.a.double()
            # As above: float32 bases and factors.
            assert reference.ratio(new_b.double() @ new_a.double() - gamma * original, original) < 2e-6


@pytest.mark.parametrize("energy", [0.0, 0.8])
def test_csulora_of_nothing_is_nothing(energy: float, cache: ProjectorCache) -> None:
    for a, b in ((torch.ones(2, 96), torch.zeros(32, 2)), (torch.zeros(2, 96), torch.zeros(32, 2))):
        new = METHODS["csulora"].project(
            ModuleDelta(a, b, cache.projector(K0)), Policy(method="csulora", energy=energy)
        )
        assert not any(side.any() for side in new)


def test_csulora_of_more_ranks_than_a_side_has(cache: ProjectorCache, pair: Pair) -> None:
    policy, rank = Policy(method="csulora", energy=0.8), 40
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randn(rank, 96, generator=generator), torch.randn(32, rank, generator=generator)
    delta = ModuleDelta(a, b, cache.projector(K0))
    new_a, new_b = METHODS["csulora"].project(delta, policy)
    assert (new_a.shape, new_b.shape) == ((32, 96), (32, 32))  # of K0's shape: nothing is cut off
    expected = reference.damped(pair.v(K0), delta.a, delta.b, policy.energy)
    assert reference.ratio(new_b.double() @ new_a.double() - expected, expected) < 2e-6  # as above


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("power", [-121, -40, 41, 120])
def test_a_methods_answer_grows_with_the_adapter(
    method: str, power: int, deltas: dict[str, ModuleDelta]
) -> None:
    """No sum or product of a method overflows or vanishes before the adapter does."""
    policy = Policy(method=method, select="all", energy=0.8)
    for delta in deltas.values():
        scaled = ModuleDelta(delta.a, delta.b * 2.0**power, delta.projector)
        plain, found = (reference.product(*METHODS[method].project(d, policy)) for d in (delta, scaled))
        # Powers of two are exact, but for the roots of odd ones: two more roundings to float32.
        assert reference.ratio(found * 2.0**-power - plain, plain) < 2e-7


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_raises_nothing(
    method: str, bad: float, deltas: dict[str, ModuleDelta]
) -> None:
    delta = deltas[K0]
    for side in "ab":
        factors = {"a": delta.a.clone(), "b": delta.b.clone()}
        factors[side][1, 1] = bad
        spoiled = ModuleDelta(**factors, projector=delta.projector)
        a, b = METHODS[method].project(spoiled, Policy(method=method, energy=0.8))
        assert not torch.isfinite(b @ a).all()


@pytest.mark.parametrize("method", METHODS)
def test_values_that_do_not_fit_the_served_dtype_are_refused(
    method: str, cache: ProjectorCache, tmp_path: Path, store: PublishedStore
) -> None:
    draft = Draft()
    for side in "AB":
        draft.tensors[key(K0, side)] = 1e9 * draft.tensors[key(K0, side)]
    settings = GateSettings(cache, Policy(method=method, energy=0.8), dtype=torch.float16)
    assert codes(judge(draft.write(tmp_path / "huge"), settings, store)) == {"non_finite"}


def test_threshold_decisions_are_those_of_float64(
    form: tuple[str, str], build_cache: Callable[[str, str], Path], pair: Pair
) -> None:
    cache, band = ProjectorCache(build_cache(*form)), TOLERANCE[form[0]]
    compared = kept = 0
    for seed in range(8):
        deltas = measured(cache, seed)
        exact = {name: reference.similarity(pair.v(name), d.a, d.b) for name, d in deltas.items()}
        for threshold in (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7):
            policy = Policy(method="safe-lora", threshold=threshold)
            chosen = policy.selects(intervals(deltas)).projected
            for name, similarity in exact.items():
                if abs(similarity - threshold) > band:
                    assert (name in chosen) == (similarity <= threshold)
                    compared += 1
                    kept += name not in chosen
    assert compared > 800 and 200 < kept < compared - 200  # the table has both answers, often


def test_number_decisions_are_those_of_float64(
    form: tuple[str, str], build_cache: Callable[[str, str], Path], pair: Pair
) -> None:
    cache, band = ProjectorCache(build_cache(*form)), TOLERANCE[form[0]]
    compared = 0
    for seed in range(8):
        deltas = measured(cache, seed)
        exact = {name: reference.similarity(pair.v(name), d.a, d.b) for name, d in deltas.items()}
        order = sorted(exact, key=lambda name: exact[name])
        for number in range(1, len(order)):
            if exact[order[number]] - exact[order[number - 1]] > 2 * band:
                policy = Policy(method="safe-lora", select="number", number=number)
                chosen = policy.selects(intervals(deltas)).projected
                assert chosen == set(order[:number])
                compared += 1
    assert compared > 60


def test_all_selects_every_module_but_those_without_a_delta(deltas: dict[str, ModuleDelta]) -> None:
    empty = next(iter(deltas))
    zero = ModuleDelta(deltas[empty].a, torch.zeros_like(deltas[empty].b), deltas[empty].projector)
    assert zero.similarity is None and zero.served(zero.a, zero.b).retained is None
    selected = Policy(method="safe-lora", select="all").selects(intervals({**deltas, empty: zero}))
    assert selected == (set(deltas) - {empty}, set())


def test_similarity_does_not_depend_on_the_scale(deltas: dict[str, ModuleDelta]) -> None:
    for delta in deltas.values():
        scaled = ModuleDelta(delta.a, delta.b * 64.0, delta.projector)
        assert scaled.similarity == pytest.approx(delta.similarity, abs=1e-12)  # a power of two
        assert scaled.relative_norm == pytest.approx(64.0 * delta.relative_norm, rel=1e-12)


def test_unprojected_weights_retain_all(deltas: dict[str, ModuleDelta]) -> None:
    delta = next(iter(deltas.values()))
    assert delta.served(delta.a, delta.b).retained == 1.0


def test_a_method_is_its_entry_in_the_registry(
    cache: ProjectorCache, tmp_path: Path, store: PublishedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Policies, the gate, strictness and calibration follow from what its file says."""
    halving = Method(
        name="halving",
        project=lambda delta, policy: (delta.a, delta.b * (1.0 - policy.energy)),
        options={"energy": Option("the share of B to remove", more_is_stricter=True)},
        select="number",
        energy=0.5,
        calibrator=METHODS["safe-lora"].calibrator,
    )
    monkeypatch.setitem(METHODS, "halving", halving)
    policy = Policy(method="halving", number=5)
    assert (policy.select, policy.energy) == ("number", 0.5) and policy.has_effect("energy")
    stricter = dataclasses.replace(policy, energy=0.75)
    assert stricter.at_least_as_strict(policy) and not policy.at_least_as_strict(stricter)
    assert policy.tightened(stricter) == stricter
    with pytest.raises(PolicyError, match="Set `method` to 'input-removal' or 'csulora' or 'halving', or"):
        Policy(method="safe-lora").check_effective(["energy"])
    with pytest.raises(PolicyError, match="with `energy` 0 nothing is projected"):
        Policy(method="halving", energy=0.0).check_effective(["energy"])
    report = judge(Draft().write(tmp_path / "a"), GateSettings(cache, policy), store).report
    retained = sorted(report.values("retained"))
    assert retained[:5] == pytest.approx([0.5] * 5) and retained[5:] == [1.0] * 9
    calibration = calibrate([cache.projector(name) for name in cache.modules], policy)
    assert calibration.strength == "number" and calibration.whole.projected == 5
