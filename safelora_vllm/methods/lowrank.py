"""Products and norms of factored matrices ``B A`` that never build the dense product.

For B, X, Y of shape (d_out, r) and A of shape (r, d_in), with the Gram matrix ``G = A Aᵀ`` (r, r):

    ⟨X A, Y A⟩_F = tr(Aᵀ Xᵀ Y A) = tr((Xᵀ Y) G)

so an inner product costs O((d_out + d_in) r²) instead of O(d_out · d_in · r). Figures and factors are
float64: the usual float32 cosine over the dense matrices is off by up to 4e-3 at 7B shapes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def gram(a: Tensor) -> Tensor:
    """``A Aᵀ`` of A (r, d_in), in float64, shape (r, r)."""
    wide = a.to(torch.float64)
    return wide @ wide.T


class Products(NamedTuple):
    """``‖X A‖²``, ``⟨X A, Y A⟩`` and ``‖Y A‖²``, and what X and Y would have if no two ranks met.

    A spread is ``(Σ_k ‖x_k‖ ‖a_k‖)²`` over the ranks k, what the product would have if all ranks were one. It
    is zero only where every rank is zero; for unrelated ranks r times the product's, and far more where they
    cancel each other.
    """

    xx: float
    xy: float
    yy: float
    x_spread: float
    y_spread: float


def products(x: Tensor, y: Tensor, g: Tensor) -> Products:
    """The figures of X, Y (d_out, r) and ``g = gram(A)``. One product of the stacked factors gives all."""
    rank = x.shape[1]
    stacked = torch.cat([x.to(torch.float64), y.to(torch.float64)], dim=1)
    blocks = (stacked.T @ stacked).view(2, rank, 2, rank).transpose(1, 2)
    terms = blocks * g
    sums, spreads = terms.sum(dim=(2, 3)), terms.diagonal(dim1=2, dim2=3).abs().sqrt().sum(dim=2) ** 2
    xx, xy, _, yy, x_spread, _, _, y_spread = torch.cat([sums.flatten(), spreads.flatten()]).tolist()
    return Products(max(xx, 0.0), xy, max(yy, 0.0), x_spread, y_spread)


def coherence(norm_squared: float, spread: float) -> float:
    """``‖X A‖² / (Σ_k ‖x_k‖ ‖a_k‖)²``: 1/r for unrelated ranks, 0 where they cancel, 1 for nothing.

    What cancels in one arithmetic does not in another: the rounding of the factors, and of activations
    between them, is relative to the spread, not to the norm, and an author can make its errors add up.
    """
    return norm_squared / spread if spread != 0.0 else 1.0


def cosine(xx: float, xy: float, yy: float) -> float | None:
    """The cosine from `products`, 0 where X is zero; ``None`` where Y is: it has no direction."""
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
    shift = torch.div(_exponents(a, 1) - _exponents(b, 0), 2, rounding_mode="floor")
    return torch.ldexp(a.double(), -shift[:, None]), torch.ldexp(b.double(), shift)


def _exponents(x: Tensor, dim: int) -> Tensor:
    """Of the largest value along a dimension, 0 where that is not finite."""
    largest = x.abs().amax(dim=dim)
    return torch.frexp(torch.where(largest.isfinite(), largest, 0.0)).exponent


def unit(x: Tensor) -> tuple[Tensor, float]:
    """x/s and s, a power of two near the largest value of x: exact, and safe in any float dtype.

    B·2ᵏ with A·2⁻ᵏ is the same adapter. Without this, products of tiny factors would vanish.
    """
    largest = float(x.abs().max())
    if not (0.0 < largest < math.inf):
        return x, 1.0
    scale = 2.0 ** (math.frexp(largest)[1] - 1)
    return x / scale, scale


def component(x: Tensor, basis: Tensor) -> Tensor:
    """``Q Qᵀ X`` (d, m), in float64: what of X (d, m) lies in the span of Q (d, k), orthonormal columns.

    The products themselves are in Q's dtype.
    """
    small, scale = unit(x.to(torch.float64))
    small = small.to(basis.dtype)
    return (basis @ (basis.T @ small)).to(torch.float64) * scale


def reduced(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A' (k, d_in) and B' (d_out, k), float64, whose product is nearest to B A among all of ``rank``.

    For A (m, d_in) and B (d_out, m): QR of both, and the singular values of what is between their
    orthonormal sides, (m, m) at most (Eckart and Young). Each side has the roots of the k largest ones as
    its norms, k = min(rank, m, d_in, d_out). All NaN where the product is not finite.
    """
    left, right = torch.linalg.qr(b.to(torch.float64)), torch.linalg.qr(a.to(torch.float64).T)
    core = left.R @ right.R.T
    if not core.isfinite().all():
        k = min(rank, *core.shape)
        return right.R.new_full((k, a.shape[1]), math.nan), left.R.new_full((b.shape[0], k), math.nan)
    u, sizes, v = torch.linalg.svd(core, full_matrices=False)
    roots = sizes[:rank].sqrt()
    return roots[:, None] * (v[:rank] @ right.Q.T), (left.Q @ u[:, :rank]) * roots
