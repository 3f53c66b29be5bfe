"""What a policy does to a random adapter: against dense float64 matrices, and against random adapters."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from safelora_vllm.errors import PolicyError, ProjectorCacheError, UsageError
from safelora_vllm.methods import METHODS
from safelora_vllm.methods.calibration import calibrate, calibrator_of, search_of
from safelora_vllm.methods.input_removal import InputRemovalEffect, energy_that_keeps, largest_energy
from safelora_vllm.methods.method import Spread
from safelora_vllm.methods.safe_lora import SafeLoraEffect, norm_kept
from safelora_vllm.methods.selection import Interval
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import Projector, ProjectorCache
from tests import reference
from tests.module_delta import ModuleDelta
from tests.tiny import Pair, module_shapes

DRAWS, RANK = 60, 4
EXACT = 1e-9  # both sides are float64; the cache has V's spectrum from a Gram matrix


@pytest.fixture
def projectors(cache: ProjectorCache) -> list[Projector]:
    """One per module of the tiny pair, as the command reads them."""
    return [cache.projector(name) for name in cache.modules]


def spectrum(pair: Pair, name: str) -> Tensor:
    """The squared singular values of V, largest first, as shares of ‖V‖_F²."""
    squared = torch.linalg.svdvals(pair.v(name)) ** 2
    return squared / squared.sum()


def directions(shares: Tensor, energy: float) -> int:
    """The fewest singular vectors whose shares add up to the energy, by adding them up."""
    held, k = 0.0, 0
    for share in shares.tolist():
        if held >= energy:
            break
        held, k = held + share, k + 1
    return k


def random_adapters(projector: Projector, seed: int = 3) -> Iterator[ModuleDelta]:
    """Adapters whose A and B are isotropic."""
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = projector.entry.shape
    for _ in range(DRAWS):
        a = torch.randn(RANK, d_in, generator=generator)
        yield ModuleDelta(a, torch.randn(d_out, RANK, generator=generator), projector)


@pytest.mark.parametrize("energy", [0.0, 0.1, 0.5, 0.8, 0.95])
def test_directions_and_energies_are_those_of_the_dense_spectrum(
    energy: float, projectors: list[Projector], pair: Pair
) -> None:
    policy = Policy(method="input-removal", energy=energy)
    calibration = calibrate(projectors, policy)
    assert set(calibration.types) == {name.rpartition(".")[2] for name in module_shapes()}
    groups = {"": list(module_shapes())}
    for name in module_shapes():
        groups.setdefault(name.rpartition(".")[2], []).append(name)
    for kind, names in groups.items():
        effect = calibration.types[kind] if kind else calibration.whole
        assert isinstance(effect, InputRemovalEffect)
        counts = [directions(spectrum(pair, name), energy) for name in names]
        taken = sorted(k / pair.v(name).shape[1] for k, name in zip(counts, names, strict=True))
        held = sum(
            float(spectrum(pair, name)[:k].sum() * pair.v(name).norm() ** 2)
            for k, name in zip(counts, names, strict=True)
        )
        assert effect.taken == Spread(taken[0], statistics.median(taken), taken[-1])
        assert effect.energy == pytest.approx(
            held / sum(float(pair.v(name).norm() ** 2) for name in names), abs=EXACT
        )
        assert effect.effect_kept == pytest.approx(1 - sum(taken) / len(taken), abs=EXACT)
        assert effect.least_kept == pytest.approx(1 - taken[-1], abs=EXACT)
        assert effect.modules == effect.projected == len(names)


def test_input_removal_leaves_random_adapters_what_was_calculated(projectors: list[Projector]) -> None:
    policy = Policy(method="input-removal", energy=0.6)
    expected = set()
    for projector in projectors:
        left = []
        for delta in random_adapters(projector):
            retained = delta.served(*METHODS["input-removal"].project(delta, policy)).retained
            assert retained is not None
            left.append(retained**2)
        effect = calibrate([projector], policy).whole
        error = statistics.stdev(left) / DRAWS**0.5
        # The mean of 60 draws is within 4 of its standard errors.
        assert statistics.fmean(left) == pytest.approx(effect.effect_kept, abs=4 * error)
        assert error < 0.02
        expected.add(round(effect.effect_kept, 2))
    assert len(expected) > 5 and max(expected) - min(expected) > 0.2  # modules differ: the test can tell


def test_norm_kept_is_that_of_the_dense_operator(cache: ProjectorCache, pair: Pair) -> None:
    for name in cache.modules:
        operator = reference.operator(pair.v(name))
        dense = float(torch.linalg.matrix_norm(operator)) / operator.shape[0] ** 0.5
        assert norm_kept(cache.projector(name)) == pytest.approx(dense, rel=EXACT)


def test_safe_lora_leaves_random_adapters_what_was_calculated(projectors: list[Projector]) -> None:
    for projector in projectors:
        ratios = [delta.served(delta.a, delta.image).retained for delta in random_adapters(projector)]
        squared = [ratio**2 for ratio in ratios if ratio is not None]
        error = statistics.stdev(squared) / DRAWS**0.5
        effect = calibrate([projector], Policy(method="safe-lora", select="all")).whole
        assert isinstance(effect, SafeLoraEffect)
        # The same 4 standard errors; here the bias of a mean of ratios is well below them.
        assert statistics.fmean(squared) == pytest.approx(effect.effect_kept, abs=4 * error)
        assert effect.effect_kept == pytest.approx(effect.norm_kept.median**2, rel=EXACT)
        assert error < 0.1 * effect.effect_kept


def test_similarities_of_random_adapters_are_near_the_null_value(projectors: list[Projector]) -> None:
    """So near that almost all of them are decided about as c₀ is."""
    decided = 0
    for projector in projectors:
        name, null = projector.entry.name, projector.entry.null_similarity
        values = [delta.similarity for delta in random_adapters(projector)]
        similarities = [value for value in values if value is not None]
        deviation = statistics.stdev(similarities)
        # At rank 4 and 32 to 144 directions; it falls with the root of both.
        assert len(similarities) == DRAWS and deviation < 0.08
        # The mean of a ratio is not the ratio of the means, by less than one deviation.
        assert statistics.fmean(similarities) == pytest.approx(null, abs=deviation)
        for threshold in (null - 4 * deviation, null + 4 * deviation):
            if not 0.0 < threshold < 1.0:
                continue
            policy = Policy(method="safe-lora", threshold=threshold)
            told = calibrate([projector], policy).whole.projected == 1
            assert told == (threshold > null)
            agree = [
                (name in policy.selects({name: Interval.exact(value)}).projected) == told
                for value in similarities
            ]
            assert statistics.fmean(agree) > 0.95
            decided += len(agree)
    assert decided > DRAWS * len(projectors)


def test_number_counts_over_the_whole_model(projectors: list[Projector], pair: Pair) -> None:
    order = sorted(module_shapes(), key=lambda name: reference.null_similarity(pair.v(name)))
    calibration = calibrate(projectors, Policy(method="safe-lora", select="number", number=3))
    assert calibration.whole.projected == 3
    expected = [name.rpartition(".")[2] for name in order[:3]]
    assert {kind: effect.projected for kind, effect in calibration.types.items()} == {
        kind: expected.count(kind) for kind in calibration.types
    }
    kept = [norm_kept(p) ** 2 if p.entry.name in order[:3] else 1.0 for p in projectors]
    assert calibration.whole.effect_kept == pytest.approx(sum(kept) / len(kept), abs=EXACT)


def test_input_removal_with_a_threshold_leaves_the_others_alone(projectors: list[Projector]) -> None:
    null = sorted(p.entry.null_similarity for p in projectors)
    policy = Policy(method="input-removal", energy=0.8)
    chosen = dataclasses.replace(policy, select="threshold", threshold=(null[4] + null[5]) / 2)
    some, every = (calibrate(projectors, rules).whole for rules in (chosen, policy))
    assert isinstance(some, InputRemovalEffect) and isinstance(every, InputRemovalEffect)
    assert some.projected == 5 and some.taken.min == 0.0 < every.taken.min
    assert some.effect_kept > every.effect_kept and some.energy < every.energy


@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 0.9, 0.97])
def test_the_energy_that_keeps_a_share_is_the_largest(
    share: float, projectors: list[Projector], pair: Pair
) -> None:
    spectra = {name: spectrum(pair, name) for name in module_shapes()}
    keeping = [
        n / 100
        for n in range(1, 96)  # the tiny cache keeps 0.95
        if all(
            1 - directions(spectra[name], n / 100) / columns >= share
            for name, (_, columns) in module_shapes().items()
        )
    ]
    assert energy_that_keeps(share, projectors) == max(keeping)


def test_the_energies_differ_with_the_share_and_end_with_the_cache(projectors: list[Projector]) -> None:
    found = [energy_that_keeps(share, projectors) for share in (0.0, 0.5, 0.9, 0.95)]
    assert found == sorted(set(found), reverse=True) and found[0] == largest_energy(projectors) == 0.95
    with pytest.raises(PolicyError, match=r"a `max_energy` of 0\.99"):
        calibrate(projectors, Policy(method="input-removal", energy=0.99))


def test_a_share_that_no_energy_keeps(projectors: list[Projector]) -> None:
    with pytest.raises(UsageError, match=r"even 0\.01 takes 1 of 96 directions .* leaves 0\.9896") as error:
        energy_that_keeps(1.0, projectors)
    advised = float(str(error.value).split("`keep_random` ")[1].split()[0])
    assert energy_that_keeps(advised, projectors) > 0.0
    with pytest.raises(UsageError, match="no energy keeps"):
        energy_that_keeps(advised + 2e-4, projectors)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_what_is_no_share(share: float, projectors: list[Projector]) -> None:
    with pytest.raises(UsageError, match="expected a share from 0 to 1"):
        energy_that_keeps(share, projectors)


def test_ladders_rise_and_take_more_with_each_rung(projectors: list[Projector]) -> None:
    removal = calibrate(projectors, Policy(method="input-removal", energy=0.8))
    energies = [policy.energy for policy, _ in removal.ladder]
    assert (
        energies == [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95] and removal.strength == "energy"
    )
    kept = [effect.effect_kept for _, effect in removal.ladder]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) > 5
    assert removal.ladder[8][1] == removal.whole
    safe = calibrate(projectors, Policy(method="safe-lora", threshold=0.7))
    thresholds = [policy.threshold for policy, _ in safe.ladder]
    assert thresholds == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8] and safe.strength == "threshold"
    counts = [effect.projected for _, effect in safe.ladder]
    null = [p.entry.null_similarity for p in projectors]
    assert counts == [sum(value <= threshold for value in null) for threshold in thresholds]
    assert counts[0] == 0 < counts[-1] and safe.ladder[6][1] == safe.whole


def test_a_policy_that_counts_modules_has_a_ladder_of_counts(projectors: list[Projector]) -> None:
    found = calibrate(projectors, Policy(method="safe-lora", select="number", number=2))
    numbers = [policy.number for policy, _ in found.ladder]
    assert found.strength == "number" and numbers == sorted(set(numbers)) and numbers[-1] == len(projectors)
    assert [effect.projected for _, effect in found.ladder] == numbers


def test_nothing_but_the_energies_is_read(cache: ProjectorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, read = ProjectorCache(cache.folder), []
    original = fresh.tensor

    def tensor(key: str, *where: Any) -> Tensor:
        read.append(key.rpartition(".")[2])
        return original(key, *where)

    monkeypatch.setattr(fresh, "tensor", tensor)
    projectors = [fresh.projector(name) for name in fresh.modules]
    calibrate(projectors, Policy(method="safe-lora"))
    assert read == []
    energy_that_keeps(0.9, projectors)
    calibrate(projectors, Policy(method="input-removal"))
    assert read == ["energy"] * len(projectors)  # each once
    projectors[0].input_basis(0.5)
    assert read[-1] == "input_basis"


def test_a_method_that_nobody_calibrated() -> None:
    assert {name for name, method in METHODS.items() if method.calibrator is None} == {"csulora"}
    with pytest.raises(UsageError, match=r"'csulora' cannot be calibrated .* knows safe-lora, input-removal"):
        calibrator_of("csulora")
    with pytest.raises(UsageError, match=r"`keep_random` has no effect with `method` 'safe-lora'"):
        search_of("safe-lora")


@pytest.mark.parametrize("figure", ["norm", "null_similarity"])
def test_figures_that_cannot_be(figure: str, projectors: list[Projector]) -> None:
    projectors[3].entry = dataclasses.replace(projectors[3].entry, **{figure: 0.0})
    with pytest.raises(ProjectorCacheError, match=f"{figure} of {projectors[3].entry.name} is 0.0"):
        calibrate(projectors, Policy(method="safe-lora"))
