"""Certified similarities: the interval holds the float64 cosine of every adapter, and reads no Ĉ or V."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from safelora_vllm.adapters.read import Limits, RawAdapter, read_adapter
from safelora_vllm.gate.admit import GateSettings, evaluate
from safelora_vllm.methods import METHODS, certified
from safelora_vllm.methods.reads import parts_read
from safelora_vllm.methods.selection import Interval
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import Parts, ProjectorCache, Spectrum
from tests import reference
from tests.module_delta import ModuleDelta
from tests.tiny import Draft, Pair, key, module_shapes

ENERGIES = (0.0, 0.05, 0.2, 0.5, 0.8, 0.95)
DEFAULT = Policy()


def thin(energy: float) -> Parts:
    """Bases up to an energy, and no operator."""
    return Parts(False, energy, energy)


def found_by(delta: ModuleDelta, parts: Parts) -> Interval:
    """The interval of a delta that is not zero."""
    found = delta.stats(parts).similarity
    assert found is not None
    return found


def adapters(v: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A and B of one module: random ones, and some that are made for the places where a bound could fail."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = v.shape
    left = torch.linalg.svd(v).U
    a = torch.randn(4, columns, generator=generator)
    b = torch.randn(rows, 4, generator=generator)
    yield a, b
    yield a[:1], b[:, :1]
    yield a, left[:, :4].float()  # all of it along V's dominant directions
    yield a, left[:, -4:].float()  # along those that V hardly has, if at all
    yield a, (left @ torch.diag(torch.rand(rows, generator=generator).double() ** 8) @ b.double()).float()
    yield a, (left[:, :4] + 1e-4 * left[:, -4:]).float()
    yield a, (left[:, -4:] + 1e-4 * left[:, :4]).float()
    yield a * 2.0**60, b * 2.0**-90
    opposite = torch.cat([b[:, :1], -b[:, :1]], dim=1)  # ranks that cancel, nearly as far as is accepted
    yield torch.cat([a[:1], a[:1]]) + 0.05 * a[1:3], opposite + 0.05 * b[:, 1:3]
    for column in range(0, rows, 7):  # one direction each: where the bounds are met
        yield a[:1], left[:, column, None].float()


@pytest.mark.parametrize("energy", ENERGIES)
def test_the_interval_holds_the_similarity(
    energy: float, build_cache: Callable[[str, str], Path], pair: Pair
) -> None:
    cache = ProjectorCache(build_cache("bfloat16", "auto"))
    widths = []
    for index, name in enumerate(module_shapes()):
        v, projector = pair.v(name), cache.projector(name)
        for seed in (index, 100 + index):
            for a, b in adapters(v, seed):
                delta = ModuleDelta(a, b, projector)
                middle, error = found_by(delta, thin(energy))
                exact = reference.similarity(v, delta.a, delta.b)
                assert 0.0 <= middle - error <= middle + error <= 1.0
                # Nothing but the oracle's own float64 sums is left to a tolerance.
                assert abs(exact - middle) <= error + 1e-12, (name, exact, middle, error)
                widths.append(error)
    assert len(widths) > 400


def test_the_width_is_that_of_the_formula_and_shrinks_with_more_directions(
    cache: ProjectorCache, pair: Pair
) -> None:
    """The formula once more, from float64 singular vectors of V and the dense delta."""
    generator = torch.Generator().manual_seed(0)
    for name, (rows, columns) in module_shapes().items():
        a, b = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
        delta = ModuleDelta(a, b, cache.projector(name))
        left, sizes, _ = torch.linalg.svd(pair.v(name), full_matrices=False)
        w = sizes**2 / (sizes**2).sum()
        dense = reference.product(delta.a, delta.b)
        x = ((left.T @ dense) ** 2).sum(dim=1) / (dense**2).sum()
        errors = []
        for energy in ENERGIES:
            k = delta.projector.directions(energy)
            n, d, q, t = w[:k] @ x[:k], (w[:k] ** 2 @ x[:k]).sqrt(), 1 - x[:k].sum(), w[k]
            low = n / d if k else torch.zeros(())
            half = float((n + t * q) / (d**2 + t**2 * q).sqrt() - low) / 2
            error = found_by(delta, thin(energy)).error
            # The rest is what is left to rounding: 1e-6 times ‖w‖/D and √k. Where the cache ends it does not
            # know the next value, only a bound on it.
            assert half <= error
            assert error < half + 1e-4 or k == len(delta.projector.energies)
            errors.append(error)
        assert errors[0] == 0.5 and errors == sorted(errors, reverse=True)
        assert found_by(delta, Parts()) == Interval(delta.similarity or 0.0, 0.0)


def test_both_ends_are_met_by_some_delta() -> None:
    """V = diag(2, 1, 1, 0), k = 1. What U_1 leaves out lies where V has nothing, or where w is t."""
    sizes, t = torch.tensor([4 / 6], dtype=torch.float64), 1 / 6
    spectrum = Spectrum(sizes, float(sizes.norm()), t)
    basis, operator = torch.eye(4)[:, :1], torch.diag(torch.tensor([4.0, 1.0, 1.0, 0.0]).double())
    for direction in (1, 3):
        b = torch.zeros(4, 1)
        b[0], b[direction] = 0.6, 0.8
        exact = reference.cosine(operator @ b.double(), b.double())
        known = certified.sums(b, torch.eye(1).double(), basis, spectrum.weights).tolist()
        low_high = certified.interval(known, 1.0, 1.0, spectrum)
        end = low_high.middle + (low_high.error if direction == 1 else -low_high.error)
        assert end == pytest.approx(exact, abs=2e-6)  # the allowance for rounding, and B in float32


def test_a_cache_that_ends_bounds_the_rest_by_its_last_value(cache: ProjectorCache, pair: Pair) -> None:
    for name in cache.modules:
        projector = cache.projector(name)
        squares = torch.linalg.svdvals(pair.v(name)) ** 2
        squares /= squares.sum()
        for energy in (0.0, 0.3, 0.95):
            spectrum = projector.spectrum(energy)
            sizes, t, k = spectrum.sizes, spectrum.following, len(spectrum.sizes)
            assert k == projector.directions(energy)
            assert torch.allclose(sizes, squares[:k], rtol=0, atol=1e-12)
            following = float(squares[k]) if k < len(squares) else 0.0
            assert following <= t + 1e-12
            assert t == pytest.approx(following, abs=1e-12) or k == len(projector.energies)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_has_no_interval(bad: float, cache: ProjectorCache) -> None:
    a, b = torch.ones(2, 96), torch.ones(96, 2)
    b[3, 1] = bad
    delta = ModuleDelta(a, b, cache.projector("model.layers.0.self_attn.q_proj"))
    assert all(math.isnan(figure) for figure in found_by(delta, thin(0.2)))
    zero = ModuleDelta(a, torch.zeros(96, 2), delta.projector)
    assert zero.stats(thin(0.2)).similarity is zero.stats(Parts()).similarity is None


@pytest.mark.parametrize("policy", [DEFAULT, Policy(method="safe-lora")], ids=["certified", "exact"])
def test_ranks_that_cancel_wholly_are_refused_as_such(
    policy: Policy, cache: ProjectorCache, tmp_path: Path
) -> None:
    draft, name = Draft(), "model.layers.0.self_attn.q_proj"
    a, b = (draft.tensors[key(name, side)] for side in "AB")
    a[1], a[3], b[:, 1], b[:, 3] = a[0], a[2], -b[:, 0], -b[:, 2]
    upload = read_adapter(draft.write(tmp_path / "adapter"), Limits())
    report, _ = evaluate(upload, "a", GateSettings(cache, policy))
    assert [(reason.code, reason.message.split(":")[0]) for reason in report.reasons] == [
        ("cancellation", name)
    ]


@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        (Policy(), Parts(False, 0.2, 0.2)),
        (Policy(energy=0.5), Parts(False, 0.5, 0.5)),
        (Policy(select="threshold"), Parts(True, 0.2, 0.0)),
        (Policy(select="number"), Parts(True, 0.2, 0.0)),
        (Policy(method="csulora"), Parts(False, 0.95, 0.95)),
        (Policy(method="csulora", select="number"), Parts(True, 0.95, 0.95)),
        (Policy(method="safe-lora"), Parts(True, 0.0, 0.0)),
        (Policy(method="safe-lora", select="all"), Parts(True, 0.0, 0.0)),
        (Policy(mode="report-only"), Parts(False, 0.2, 0.2)),
    ],
    ids=str,
)
def test_what_a_policy_reads(policy: Policy, parts: Parts) -> None:
    assert parts_read(policy, thin=False) == parts


@pytest.fixture
def upload(tmp_path: Path) -> RawAdapter:
    """An adapter on all modules."""
    return read_adapter(Draft().write(tmp_path / "adapter"), Limits())


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_policy_reads_its_parts_and_no_others(
    method: str, loaded: bool, cache: ProjectorCache, upload: RawAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, opened = Policy(method=method, select="all"), ProjectorCache(cache.folder)
    reads: set[str] = set()
    inner = opened._shards.read

    def read(name: str, *rest: Any) -> Tensor:
        reads.add(name.rpartition(".")[2])
        return inner(name, *rest)

    monkeypatch.setattr(opened._shards, "read", read)
    parts = parts_read(policy, cache.thin)
    if loaded:
        opened.load("cpu", None, **dataclasses.asdict(parts))
        held, before = opened.resident_bytes()["device"], set(reads)
        reads.clear()
    report, _ = evaluate(upload, "a", GateSettings(opened, policy))
    assert report.accepted and report.count("projected") == len(module_shapes())
    if loaded:
        assert reads == set() and opened.resident_bytes()["device"] == held
        reads = before
    bases = {"energy", "input_basis", "output_basis"}
    assert reads - {"energy"} == ({"projector", "delta"} if method == "safe-lora" else bases - {"energy"})


def test_a_report_of_the_default_policy_says_how_sure_its_similarities_are(
    cache: ProjectorCache, upload: RawAdapter
) -> None:
    """The same modules, once certified and once by Ĉ."""
    thin_report, exact_report = (
        evaluate(upload, "a", GateSettings(cache, policy))[0]
        for policy in (DEFAULT, Policy(select="threshold", threshold=1.0))
    )
    for found, exact in zip(thin_report.modules, exact_report.modules, strict=True):
        assert found.similarity is not None and exact.similarity is not None
        assert exact.similarity_error == 0.0 < found.similarity_error < 0.5
        assert abs(found.similarity - exact.similarity) <= found.similarity_error
        assert dataclasses.replace(found, similarity=exact.similarity, similarity_error=0.0) == exact


@given(
    inside=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=6),
    outside=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6),
    loose=st.floats(1.0, 4.0),
    data=st.data(),
)
def test_the_interval_holds_it_where_what_follows_is_only_bounded(
    inside: list[float], outside: list[float], loose: float, data: st.DataObject
) -> None:
    """A bound on what follows may be above values of directions that are kept."""
    whole = sum(inside) + sum(outside)
    kept, rest = [x / whole for x in inside], [x / whole for x in outside]
    shares = [data.draw(st.floats(0.0, 1.0)) for _ in (*kept, *rest)]
    assume(sum(shares) > 1e-3)
    pairs = [(w, x / sum(shares)) for w, x in zip([*kept, *rest], shares, strict=True)]
    size = math.sqrt(sum(w * w * x for w, x in pairs))
    assume(size > 1e-9)
    similarity = sum(w * x for w, x in pairs) / size
    known = [sum(w**power * x for w, x in pairs[: len(kept)]) for power in (1, 2, 0)]
    sizes = torch.tensor(kept, dtype=torch.float64)
    found = certified.interval(known, 1.0, 1.0, Spectrum(sizes, float(sizes.norm()), loose * max(rest)))
    assert abs(similarity - found.middle) <= found.error + 1e-12


def test_equal_values_and_a_loose_bound_do_not_lower_the_upper_end() -> None:
    """Of a delta in directions of one value the similarity is 1."""
    sizes = torch.full((4,), 0.24, dtype=torch.float64)
    for inside in (1.0, 0.5):
        known = [0.24 * inside, 0.24**2 * inside, inside]
        found = certified.interval(known, 1.0, 1.0, Spectrum(sizes, float(sizes.norm()), 0.28))
        assert found.middle + found.error >= 1.0 - 1e-12
