"""Dominant directions against float64 singular vectors: what they hold, and that every bound is one."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safelora_vllm.methods.certified import interval, sums
from safelora_vllm.projectors import build as build_module
from safelora_vllm.projectors import module as one_module
from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.cache import Parts, ProjectorCache
from safelora_vllm.projectors.dominant import Dominant, dominant
from safelora_vllm.projectors.manifest import ModuleEntry
from safelora_vllm.projectors.projector import Projector
from safelora_vllm.projectors.subspace import CONVERGED, gram, largest_beyond
from safelora_vllm.projectors.weight_change import weight_change
from tests import reference
from tests.module_delta import ModuleDelta
from tests.test_certified import adapters
from tests.tiny import Pair, module_shapes

SHAPES = [(240, 240), (200, 320), (320, 200)]
UNCONVERGED = math.inf  # stops as soon as the energy is held
_ORACLE = 1e-12  # what float64 sums of the oracle may be off


def spectrum(kind: str, n: int) -> Tensor:
    """σ_1, σ_2, … (n,)."""
    j = torch.arange(1, n + 1).double()
    return {
        "slow": j**-0.4,
        "fast": j**-0.8,
        "low rank": torch.where(j <= 10, 1.0 / j, 1e-3),
        "exactly low rank": torch.where(j <= 10, 1.0 / j, 0.0),
        "rank 1": torch.where(j <= 1, 1.0, 0.0).double(),
        "repeated": torch.where(j <= 12, 1.0, 0.1).double(),
        "a repeated edge": torch.where(j <= 2, 2.0, torch.where(j <= 40, 0.5, 0.1)).double(),
    }[kind]


KINDS = ("slow", "fast", "low rank", "exactly low rank", "rank 1", "repeated", "a repeated edge")


def drawn(shape: tuple[int, int], sizes: Tensor, seed: int = 0) -> Tensor:
    """V of float32 values with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, _, right = torch.linalg.svd(torch.randn(*shape, generator=generator).double(), full_matrices=False)
    return ((left * sizes) @ right).float()


def found_in(v: Tensor, energy: float, converged: float = CONVERGED, seed: int = 1) -> Dominant | None:
    """The dominant directions of V."""
    return dominant(v, float(v.double().norm()), energy, seed, converged)


def normalised(v: Tensor) -> tuple[Tensor, Tensor]:
    """V/‖V‖_F and C in float64."""
    wide = v.double() / v.double().norm()
    return wide, wide @ wide.T


@pytest.mark.parametrize("converged", [CONVERGED, UNCONVERGED], ids=["converged", "not"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_directions_and_bounds(kind: str, shape: tuple[int, int], converged: float) -> None:
    v = drawn(shape, spectrum(kind, min(shape)))
    found = found_in(v, 0.4, converged)
    assert found is not None
    wide, c = normalised(v)
    k, w = len(found.shares), torch.diff(found.shares, prepend=torch.zeros(1).double())
    for basis in (found.left, found.right):
        assert torch.allclose(basis.T @ basis, torch.eye(k).double(), atol=1e-7)
    assert found.shares[-1] >= 0.4 - 1e-9 and (k == 1 or found.shares[-2] < 0.4)
    # Both sides hold what is said, and no subspace holds more than the singular vectors do.
    exact = (torch.linalg.svdvals(wide) ** 2).cumsum(0)
    for j in range(1, k + 1):
        share = float(found.shares[j - 1])
        assert share <= float((wide @ found.right[:, :j]).norm() ** 2) + 1e-7
        assert share <= float((wide.T @ found.left[:, :j]).norm() ** 2) + 1e-7
        assert share <= float(exact[j - 1]) + 1e-7
    if converged == CONVERGED:
        assert k <= int((exact < 0.4).sum()) + 1 + k // 20
    eye = torch.eye(shape[0]).double()
    for j in range(1, k + 1):
        left = found.left[:, :j]
        outside = eye - left @ left.T
        rest = outside @ c @ outside
        block = left @ torch.diag(w[:j]) @ left.T + rest
        assert torch.linalg.matrix_norm(c - block, 2) <= found.residuals[j - 1] + _ORACLE
        following = max([found.following, *w[j : j + 1].tolist()]) + float(found.residuals[-1])
        assert torch.linalg.matrix_norm(rest, 2) <= following + _ORACLE
    assert found.gram_norm == pytest.approx(float(c.norm()), rel=1e-5)  # a float32 sum


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_converged_residuals_are_small(shape: tuple[int, int]) -> None:
    """Those of directions well above the last one are at float32's rounding."""
    found = found_in(drawn(shape, spectrum("slow", min(shape))), 0.4)
    assert found is not None
    half = int((found.shares < 0.2).sum())
    assert found.residuals[half] < 1e-5 < found.shares[0] and found.residuals[-1] < 1e-3
    last = float(found.shares[-1] - found.shares[-2])
    assert last / 2 < found.following < 2 * last


def test_a_flat_spectrum_has_none() -> None:
    v = drawn((200, 200), torch.ones(200).double())
    assert found_in(v, 0.4) is None
    assert found_in(drawn((200, 200), spectrum("slow", 200)), 0.9) is None
    for shape in ((1, 1), (1, 50), (3, 3)):
        assert found_in(torch.ones(shape), 0.4) is None
    assert found_in(torch.ones(8, 8), 1.0) is not None


def test_the_same_seed_gives_the_same_bytes() -> None:
    v = drawn((240, 240), spectrum("slow", 240))
    one, other, third = (found_in(v, 0.4, seed=seed) for seed in (1, 1, 2))
    assert one is not None and other is not None and third is not None
    assert torch.equal(one.left, other.left) and torch.equal(one.residuals, other.residuals)
    assert not torch.equal(one.left, third.left)


def test_the_bound_on_what_follows_is_near_it() -> None:
    """For 200 draws; it may be up to (‖AᵖZ‖/√1.4)^(1/12) times as large."""
    v = drawn((200, 240), spectrum("slow", 200))
    matrix = gram(v, float(v.double().norm()) ** 2)
    values = torch.linalg.eigvalsh(matrix.double()).flip(0)
    basis = torch.linalg.eigh(matrix.double()).eigenvectors.flip(1)
    for k in (0, 5, 60):
        for seed in range(70):
            bound = largest_beyond(matrix, basis[:, :k].float(), torch.Generator().manual_seed(seed))
            assert float(values[k]) <= bound <= 1.5 * float(values[k])
    assert largest_beyond(torch.zeros(50, 50), basis[:50, :2].float(), torch.Generator()) < 1e-5


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_v_at_any_scale(scale: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    before = (scale * torch.randn(30, 50, generator=generator)).to(dtype)
    after = (scale * torch.randn(30, 50, generator=generator)).to(dtype)
    change, exact = weight_change(before, after), after.double() - before.double()
    assert torch.allclose(change.v.double() * change.scale, exact, rtol=2.0**-24, atol=0)
    assert change.norm == pytest.approx(float(exact.norm()), rel=1e-6)
    assert change.aligned_norm == pytest.approx(float(after.double().norm()), rel=1e-12)
    assert 2.0**-30 < float(change.v.abs().max()) < 2.0**30


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_have_no_finite_norm(bad: float) -> None:
    weights = [torch.zeros(8, 8), torch.zeros(8, 8)]
    for side in (0, 1):
        spoiled = [w.clone() for w in weights]
        spoiled[side][2, 3] = bad
        change = weight_change(*spoiled)
        assert not (math.isfinite(change.norm) and math.isfinite(change.aligned_norm))


def projector(found: Dominant, shape: tuple[int, int]) -> Projector:
    """As it is read from a cache."""
    energies = torch.stack([found.shares, found.residuals])
    cache: Any = SimpleNamespace(tensor=lambda *_: energies)
    entry = ModuleEntry("m", shape, "thin", 1.0, 1.0, 0.5, "shard", following=found.following)
    return Projector(entry, cache, torch.device("cpu"))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    shape=st.sampled_from([(48, 48), (40, 64), (64, 40)]),
    decay=st.floats(0.3, 2.0),
    converged=st.sampled_from([CONVERGED, UNCONVERGED]),
)
def test_no_similarity_is_outside_of_its_interval(
    seed: int, shape: tuple[int, int], decay: float, converged: float
) -> None:
    """Of random adapters and of those where a bound could fail, with bases that are far off too."""
    v = drawn(shape, torch.arange(1, min(shape) + 1).double() ** -decay, seed)
    if (found := found_in(v, 0.4, converged, seed)) is None:
        return
    wide, known = normalised(v)[0], projector(found, shape)
    for a, b in adapters(wide, seed):
        # C has no negative eigenvalue: below 0 is the oracle's rounding, where C B A nearly vanishes.
        exact = min(1.0, max(0.0, reference.similarity(wide, a, b)))
        dense = float(reference.product(a, b).norm() ** 2)
        for energy in (0.05, 0.2, 0.4):
            spectrum = known.spectrum(energy)
            basis = found.left[:, : len(spectrum.sizes)].float()
            wide_a = a.double()
            sums_of = sums(b, wide_a @ wide_a.T, basis, spectrum.weights).tolist()
            coherence = dense / float((b.double().norm(dim=0) * wide_a.norm(dim=1)).sum() ** 2)
            middle, error = interval(sums_of, dense, coherence, spectrum)
            assert abs(exact - middle) <= error + _ORACLE, (energy, exact, middle, error)


@pytest.fixture(params=[CONVERGED, UNCONVERGED], ids=["converged", "not"])
def approximate(
    request: pytest.FixtureRequest, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> ProjectorCache:
    """A thin cache, all of whose modules that are not flat have approximate directions."""
    monkeypatch.setattr(build_module, "_DOMINANT_FROM", 1)
    monkeypatch.setattr(one_module, "dominant", partial(dominant, converged=request.param))
    return ProjectorCache(build(pair.base, pair.aligned, tmp_path / "thin", BuildOptions()))


def test_a_cache_of_approximate_directions(
    approximate: ProjectorCache, cache: ProjectorCache, pair: Pair
) -> None:
    manifest = json.loads((approximate.folder / "manifest.json").read_bytes())
    assert manifest["version"] == 3
    rough = [name for name, entry in approximate.modules.items() if entry.following < 1.0]
    assert len(rough) >= len(module_shapes()) // 2
    for name in module_shapes():
        exact, entry = cache.modules[name], approximate.modules[name]
        for figure in ("norm", "aligned_norm", "null_similarity"):
            assert getattr(entry, figure) == pytest.approx(getattr(exact, figure), rel=1e-5)
        v, found = pair.v(name), approximate.projector(name)
        for a, b in adapters(v, 3):
            for energy in (0.0, 0.05, 0.2, 0.4):
                delta = ModuleDelta(a, b, found)
                similarity = delta.stats(Parts(False, energy, energy)).similarity
                assert similarity is not None
                middle, error = similarity
                assert abs(reference.similarity(v, delta.a, delta.b) - middle) <= error + _ORACLE
        removed = v @ found.input_basis(0.2).double()
        assert float((removed**2).sum() / (v**2).sum()) >= 0.2 - 1e-6
    approximate.load("cpu")
    assert approximate.resident_bytes()["disk"] == 0


def test_a_cache_without_approximate_directions_is_of_the_older_version(pair: Pair, tmp_path: Path) -> None:
    folder = build(pair.base, pair.aligned, tmp_path / "thin", BuildOptions())
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["version"] == 2 and not any("following" in module for module in manifest["modules"])


def test_the_random_columns_depend_on_the_weights() -> None:
    """Who knew them could make weights that hide their largest direction from them."""
    generator, seeds = torch.Generator().manual_seed(0), []
    weight, change = (torch.randn(64, 80, generator=generator) for _ in range(2))
    bit = torch.zeros_like(change)
    bit[0, 0] = 1e-3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_module, "dominant", lambda _v, _norm, _energy, seed: seeds.append(seed))
        patch.setattr(one_module, "whole_module", lambda *_: None)
        for name, v in (("a", change), ("a", change), ("b", change), ("a", change + bit)):
            one_module.thin_module(name, [weight, weight + v], 0.4)
    assert seeds[0] == seeds[1] and len(set(seeds)) == 3
