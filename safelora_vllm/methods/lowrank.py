"""Products and norms of factored matrices ``B A`` that never build the dense product.

For B, X, Y of shape (d_out, r) and A of shape (r, d_in), with the Gram matrix ``G = A Aᵀ`` (r, r):

    ⟨X A, Y A⟩_F = tr(Aᵀ Xᵀ Y A) = tr((Xᵀ Y) G)

so an inner product costs O((d_out + d_in) r²) instead of O(d_out · d_in · r). Figures and factors are
float64: the usual float32 cosine over the dense matrices is off by up to 4e-3 at 7B shapes.

All of it may have leading dimensions, of modules of one shape: then one operator serves all of them. What
waits for the device is only what returns floats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gram(a: Tensor) -> Tensor:
    """``A Aᵀ`` of A (r, d_in), in float64, shape (r, r)."""
    wide = a.to(torch.float64)
    return wide @ wide.mT


_SHIFT = 2.0**-36  # far above the rounding of a Gram matrix of r ≤ 512 ranks, far below what is judged


def product_sums(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """``‖X A‖²``, ``⟨X A, Y A⟩`` and ``‖Y A‖²``, (3,) float64, of X, Y (d_out, r) and ``g = gram(A)``."""
    rank = x.shape[-1]
    stacked = torch.cat([x.to(torch.float64), y.to(torch.float64)], dim=-1)
    blocks = (stacked.mT @ stacked).reshape(*x.shape[:-2], 2, rank, 2, rank).transpose(-3, -2)
    sums = (blocks * g[..., None, None, :, :]).sum(dim=(-2, -1))
    return sums.flatten(-2)[..., [0, 1, 3]]


def norm_sums(b_gram: Tensor, g: Tensor) -> Tensor:
    """‖BA‖² and the root of its spread, (2,) float64, of ``BᵀB`` and ``g = gram(A)``.

    The spread is ``(Σ_k ‖b_k‖ ‖a_k‖)²`` over the ranks k, what the product would have if all ranks were one.
    It is zero only where every rank has a zero side; for unrelated ranks r times the product's, and far more
    where they cancel each other.
    """
    terms = b_gram * g
    root = terms.diagonal(dim1=-2, dim2=-1).sqrt().sum(dim=-1)
    return torch.stack([terms.sum(dim=(-2, -1)), root], dim=-1)


def coherence(norm_squared: float, spread: float) -> float:
    """``‖X A‖² / (Σ_k ‖x_k‖ ‖a_k‖)²``: 1/r for unrelated ranks, 0 where they cancel, 1 for nothing.

    What cancels in one arithmetic does not in another: the rounding of the factors, and of activations
    between them, is relative to the spread, not to the norm, and an author can make its errors add up.
    """
    return norm_squared / spread if spread != 0.0 else 1.0


def cosine(xx: float, xy: float, yy: float) -> float | None:
    """The cosine from `product_sums`, 0 where X is zero; ``None`` where Y is: it has no direction."""
    if yy == 0.0:
        return None
    scale = math.sqrt(xx) * math.sqrt(yy)
    if not (math.isfinite(xy) and math.isfinite(scale)):
        return math.nan
    return max(-1.0, min(1.0, xy / scale)) if scale > 0.0 else 0.0


def balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same ranks of A (r, d_in) and B (d_out, r), in float64, each as large on one side as on the other.

    Which of both carries a rank's size is the author's choice and changes nothing, until values are rounded
    near the ends of the served dtype: there a huge A would hide what becomes of a tiny B. A power of two
    per rank goes from one side to the other, which is exact.
    """
    return _balance(a.to(torch.float64, copy=True), b.to(torch.float64, copy=True))


def _balance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`balanced` of float64 factors, in place: what is large is slow to allocate."""
    largest = torch.stack([_largest(a, (-1,)), _largest(b, (-2,))])
    exponents = _exponents(largest)
    scale = _power_of_two((exponents[0] - exponents[1]) >> 1)
    return a.div_(scale[..., :, None]), b.mul_(scale[..., None, :])


def _largest(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest absolute value along dimensions, with no copy of x."""
    return torch.maximum(x.amax(dim=dims), -x.amin(dim=dims))


def _exponents(largest: Tensor) -> Tensor:
    """Of the largest values of something, 0 where they are not finite."""
    return torch.frexp(torch.nan_to_num(largest, nan=0.0, posinf=0.0, neginf=0.0)).exponent


def _power_of_two(exponent: Tensor) -> Tensor:
    """2ᵏ in float64 for whole k from -1022 to 1023, put together from its bits: exact on every device."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x/s and s (1, 1), a power of two next to the largest value of x: exact, and safe in any float dtype.

    B·2ᵏ with A·2⁻ᵏ is the same adapter. Without this, products of tiny factors would vanish.
    """
    scale = _power_of_two(_exponents(_largest(x, (-2, -1))))[..., None, None]
    return x / scale.to(x.dtype), scale


def component(x: Tensor, basis: Tensor, taken: Tensor | None = None) -> Tensor:
    """``Q Qᵀ X`` (d, m), in float64: what of X (d, m) lies in the span of Q (d, k), orthonormal columns.

    The products themselves are in Q's dtype. taken: (1, k), 1 for the columns of Q that count, else 0.
    """
    small, scale = unit(x)
    inside = small.to(basis.dtype).mT @ basis
    found = (inside if taken is None else inside * taken) @ basis.mT
    return (found.to(torch.float64) * scale).mT


def orthonormal(a: Tensor, b: Tensor, b_gram: Tensor) -> tuple[Tensor, Tensor]:
    """A' (r, d_in) and B' (d_out, r), float64, with the product of A and B; B' has orthogonal columns.

    With the columns of B scaled to about 1, and C the Cholesky factor of ``BᵀB + εI``, B' = B C⁻ᵀ and
    A' = Cᵀ A: whatever C is, the product stays. Ranks with orthogonal sides cannot cancel: the coherence of
    B' and A' is 1/r or more. The shift ε is for columns that depend on others: such a rank is left with √ε on
    both sides. Without the scaling one huge column, with a row of zeros in A, would make all others look as
    if they depended on others. Then `balanced`. Eigenvectors would do too, but a GPU finds those module by
    module where r is above 32.
    """
    sizes = b_gram.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    scale = _power_of_two(_exponents(sizes))
    # Of zeros where B is not finite, or zero: then any C will do, and what is not finite stays so.
    shifted = torch.nan_to_num(b_gram / scale[..., :, None] / scale[..., None, :], 0.0, 0.0, 0.0)
    shifted.diagonal(dim1=-2, dim2=-1).add_(_SHIFT)
    factor = torch.linalg.cholesky_ex(shifted).L
    even = b.to(torch.float64) / scale[..., None, :]
    new_b = torch.linalg.solve_triangular(factor, even.mT, upper=False).mT
    return _balance(factor.mT @ (a.to(torch.float64) * scale[..., :, None]), new_b)


def reduced(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A' (k, d_in) and B' (d_out, k), float64, whose product is nearest to B A among all of ``rank``.

    For A (m, d_in) and B (d_out, m): QR of both, and the singular values of what is between their
    orthonormal sides, (m, m) at most (Eckart and Young). Each side has the roots of the k largest ones as
    its norms, k = min(rank, m, d_in, d_out). All NaN where the product is not finite.
    """
    left, right = torch.linalg.qr(b.to(torch.float64)), torch.linalg.qr(a.to(torch.float64).mT)
    core = left.R @ right.R.mT
    finite = core.isfinite().all(dim=-1).all(dim=-1)[..., None, None]
    u, sizes, v = torch.linalg.svd(torch.where(finite, core, 0.0), full_matrices=False)
    roots = torch.where(finite[..., 0], sizes[..., :rank].sqrt(), math.nan)
    new_a = roots[..., :, None] * (v[..., :rank, :] @ right.Q.mT)
    new_b = (left.Q @ u[..., :, :rank]) * roots[..., None, :]
    return torch.where(finite, new_a, math.nan), torch.where(finite, new_b, math.nan)
