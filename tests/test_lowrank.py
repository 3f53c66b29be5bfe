"""Products of factored matrices against the dense ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safelora_vllm.methods import lowrank
from tests import reference

# Both sides are float64 sums of at most 96 × 96 terms in different orders.
_FLOAT64 = 1e-11


@given(d_out=st.integers(1, 96), d_in=st.integers(1, 96), rank=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_products_norm_and_cosine_equal_the_dense_ones(d_out: int, d_in: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, d_out, rank, generator=generator)
    a = torch.randn(rank, d_in, generator=generator)
    gram = lowrank.gram(a)
    dense_x, dense_y = x.double() @ a.double(), y.double() @ a.double()

    xx, xy, yy = lowrank.product_sums(x, y, gram).tolist()
    squared, root = lowrank.norm_sums(lowrank.gram(x.mT), gram).tolist()
    assert xx == pytest.approx(float((dense_x**2).sum()), rel=_FLOAT64)
    assert yy == pytest.approx(float((dense_y**2).sum()), rel=_FLOAT64)
    # The inner product may cancel; its error is relative to the norms.
    assert xy == pytest.approx(float((dense_x * dense_y).sum()), abs=_FLOAT64 * (xx * yy) ** 0.5)
    ranks = x.double().norm(dim=0) @ a.double().norm(dim=1)
    assert squared == pytest.approx(xx, rel=_FLOAT64) and root == pytest.approx(float(ranks), rel=_FLOAT64)
    assert lowrank.cosine(xx, xy, yy) == pytest.approx(reference.cosine(dense_x, dense_y), abs=1e-9)


def test_gram_is_float64_whatever_comes_in() -> None:
    assert lowrank.gram(torch.ones(3, 5, dtype=torch.bfloat16)).dtype == torch.float64


def test_float32_sums_would_be_wrong_where_float64_is_right() -> None:
    # 1 + 1e-9 is 1 in float32: the norm of the second column would be lost.
    a = torch.eye(2)
    x = torch.tensor([[1.0, 3e-5]])
    assert float(lowrank.product_sums(x, x, lowrank.gram(a))[0]) - 1.0 == pytest.approx(9e-10, rel=1e-6)


def test_a_zero_side_has_no_angle() -> None:
    zero, some, g = torch.zeros(4, 2), torch.randn(4, 2), lowrank.gram(torch.randn(2, 3))
    assert lowrank.cosine(*lowrank.product_sums(some, zero, g).tolist()) is None, (
        "there is nothing to project"
    )
    assert lowrank.cosine(*lowrank.product_sums(zero, some, g).tolist()) == 0.0, (
        "all of it is to be projected"
    )
    assert lowrank.norm_sums(lowrank.gram(zero.mT), g)[1] == 0.0


@given(
    d_out=st.integers(1, 48), d_in=st.integers(1, 48), ranks=st.integers(1, 24), rank=st.integers(1, 12),
    power=st.integers(-100, 100), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_reduced_is_the_nearest_of_its_rank(
    d_out: int, d_in: int, ranks: int, rank: int, power: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(ranks, d_in, generator=generator).double() * 2.0**power
    b = torch.randn(d_out, ranks, generator=generator).double()
    new_a, new_b = lowrank.reduced(a, b, rank)
    k = min(rank, ranks, d_out, d_in)
    assert (new_a.shape, new_b.shape) == ((k, d_in), (d_out, k))
    assert new_a.dtype == new_b.dtype == torch.float64

    dense = b @ a
    sizes = torch.linalg.svdvals(dense)
    # Both sides are float64, their singular values of different matrices.
    close = {"rel": 1e-9, "abs": 1e-12 * float(sizes[0])}
    lost = float((sizes[k:] ** 2).sum() ** 0.5)
    assert float((new_b @ new_a - dense).norm()) == pytest.approx(lost, **close)
    for side in (new_a.norm(dim=1), new_b.norm(dim=0)):
        assert torch.allclose(side**2, sizes[:k], rtol=1e-9, atol=close["abs"])


def test_reduced_keeps_what_needs_no_more_ranks() -> None:
    a, b = torch.randn(2, 9), torch.randn(7, 2)
    twice_a, twice_b = torch.cat([a, a]), torch.cat([b, -0.5 * b], dim=1)  # 4 columns, rank 2
    new_a, new_b = lowrank.reduced(twice_a, twice_b, 2)
    assert torch.allclose(new_b @ new_a, 0.5 * b.double() @ a.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_reduced_says_nan_of_what_is_not_finite(bad: float) -> None:
    a, b = torch.ones(4, 9), torch.ones(7, 4)
    b[2, 3] = bad
    new_a, new_b = lowrank.reduced(a, b, 2)
    assert (new_a.shape, new_b.shape) == ((2, 9), (7, 2))
    assert new_a.isnan().all() and new_b.isnan().all()


@given(
    rows=st.integers(1, 48), k=st.integers(0, 48), power=st.integers(-140, 120), seed=st.integers(0, 2**32)
)
def test_component_is_the_orthogonal_projection(rows: int, k: int, power: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(rows, min(k, rows), generator=generator).double()).Q
    x = torch.randn(rows, 3, generator=generator) * 2.0**power
    found = lowrank.component(x, basis.float())
    expected = basis @ (basis.T @ x.double())
    assert found.dtype == torch.float64
    # A float32 basis, 6e-8 per value, is met twice.
    assert float((found - expected).norm()) <= 1e-6 * float(x.double().norm())


@given(st.floats(1e-12, 1e12))
def test_a_cosine_never_leaves_its_range(size: float) -> None:
    assert lowrank.cosine(size, size * (1 + 1e-15), size) == 1.0
    assert lowrank.cosine(size, -size * (1 + 1e-15), size) == -1.0
