"""Figures, decisions and projected weights of every module against dense float64 matrices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safelora_vllm.errors import PolicyError
from safelora_vllm.methods import METHODS, ModuleDelta
from safelora_vllm.policy import METHOD_NAMES, Policy
from safelora_vllm.projectors.cache import ProjectorCache
from tests import reference
from tests.tiny import Pair, key, lora, module_shapes

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
        a, b = METHODS["safe-lora"](delta, Policy())
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
        a, b = METHODS["input-removal"](delta, policy)
        original = delta.b.double() @ delta.a.double()
        expected = reference.removed(pair.v(name), delta.a, delta.b, energy)
        # The basis is float32 in every cache: 6e-8 per value, once in A R and once in (A R) Rᵀ.
        assert reference.ratio(b.double() @ a.double() - expected, original) < 2e-6
        assert delta.served(a, b).retained == pytest.approx(reference.ratio(expected, original), abs=2e-6)
        assert b is delta.b


def test_no_energy_takes_nothing_and_too_much_is_refused(deltas: dict[str, ModuleDelta]) -> None:
    delta = next(iter(deltas.values()))
    a, _ = METHODS["input-removal"](delta, Policy(method="input-removal", energy=0.0))
    assert torch.equal(a, delta.a)
    with pytest.raises(PolicyError, match=r"energy 0\.99 is above .* --max-energy 0\.99"):
        METHODS["input-removal"](delta, Policy(method="input-removal", energy=0.99))


def test_threshold_decisions_are_those_of_float64(
    form: tuple[str, str], build_cache: Callable[[str, str], Path], pair: Pair
) -> None:
    cache, band = ProjectorCache(build_cache(*form)), TOLERANCE[form[0]]
    compared = kept = 0
    for seed in range(8):
        deltas = measured(cache, seed)
        exact = {name: reference.similarity(pair.v(name), d.a, d.b) for name, d in deltas.items()}
        for threshold in (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7):
            policy = Policy(threshold=threshold)
            chosen = policy.selects({name: delta.similarity for name, delta in deltas.items()})
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
                policy = Policy(select="number", number=number)
                chosen = policy.selects({name: delta.similarity for name, delta in deltas.items()})
                assert chosen == set(order[:number])
                compared += 1
    assert compared > 60


def test_all_selects_every_module_but_those_without_a_delta(deltas: dict[str, ModuleDelta]) -> None:
    empty = next(iter(deltas))
    zero = ModuleDelta(deltas[empty].a, torch.zeros_like(deltas[empty].b), deltas[empty].projector)
    assert zero.similarity is None and zero.served(zero.a, zero.b).retained is None
    similarities = {name: delta.similarity for name, delta in {**deltas, empty: zero}.items()}
    assert Policy(select="all").selects(similarities) == set(deltas) - {empty}


def test_similarity_does_not_depend_on_the_scale(deltas: dict[str, ModuleDelta]) -> None:
    for delta in deltas.values():
        scaled = ModuleDelta(delta.a, delta.b * 64.0, delta.projector)
        assert scaled.similarity == pytest.approx(delta.similarity, abs=1e-12)  # a power of two
        assert scaled.relative_norm == pytest.approx(64.0 * delta.relative_norm, rel=1e-12)


def test_unprojected_weights_retain_all(deltas: dict[str, ModuleDelta]) -> None:
    delta = next(iter(deltas.values()))
    assert delta.served(delta.a, delta.b).retained == 1.0


def test_every_method_of_the_policy_exists() -> None:
    assert set(METHODS) == set(METHOD_NAMES)
