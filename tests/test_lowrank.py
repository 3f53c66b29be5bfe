"""Products of factored matrices against the dense ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safelora_vllm import lowrank
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

    xx, xy, yy, x_spread, _ = lowrank.products(x, y, gram)
    assert xx == pytest.approx(float((dense_x**2).sum()), rel=_FLOAT64)
    assert yy == pytest.approx(float((dense_y**2).sum()), rel=_FLOAT64)
    # The inner product may cancel; its error is relative to the norms.
    assert xy == pytest.approx(float((dense_x * dense_y).sum()), abs=_FLOAT64 * (xx * yy) ** 0.5)
    ranks = (x.double() ** 2).sum(0) @ (a.double() ** 2).sum(1)
    assert x_spread == pytest.approx(float(ranks), rel=_FLOAT64)
    assert lowrank.cosine(xx, xy, yy) == pytest.approx(reference.cosine(dense_x, dense_y), abs=1e-9)


def test_gram_is_float64_whatever_comes_in() -> None:
    assert lowrank.gram(torch.ones(3, 5, dtype=torch.bfloat16)).dtype == torch.float64


def test_float32_sums_would_be_wrong_where_float64_is_right() -> None:
    # 1 + 1e-9 is 1 in float32: the norm of the second column would be lost.
    a = torch.eye(2)
    x = torch.tensor([[1.0, 3e-5]])
    assert lowrank.products(x, x, lowrank.gram(a))[0] - 1.0 == pytest.approx(9e-10, rel=1e-6)


def test_a_zero_side_has_no_angle() -> None:
    zero, some, g = torch.zeros(4, 2), torch.randn(4, 2), lowrank.gram(torch.randn(2, 3))
    assert lowrank.cosine(*lowrank.products(some, zero, g)[:3]) is None, "there is nothing to project"
    assert lowrank.cosine(*lowrank.products(zero, some, g)[:3]) == 0.0, "all of it is to be projected"
    assert lowrank.products(zero, some, g).x_spread == 0.0


@given(st.floats(1e-12, 1e12))
def test_a_cosine_never_leaves_its_range(size: float) -> None:
    assert lowrank.cosine(size, size * (1 + 1e-15), size) == 1.0
    assert lowrank.cosine(size, -size * (1 + 1e-15), size) == -1.0
