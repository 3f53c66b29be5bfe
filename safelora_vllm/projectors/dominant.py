"""V's dominant singular vectors without the others, and how far they are from exact ones.

Let V be (d_out, d_in) with ‖V‖_F = 1. The vectors of its smaller side come from `subspace`. One product with
V in float64 and the SVD of what it gives (Rayleigh and Ritz) then make

    d_out ≤ d_in:  Vᵀ L = R Σ      d_out > d_in:  V R = L Σ

exact to float64 rounding, L and R with orthonormal columns. What is on one side only is approximate.

**The energy is not.** Σ_{i≤j} σ_i² is ‖Vᵀ L_j‖_F² or ‖V R_j‖_F², and at most the same of the other side, as
‖V R_j‖_F ≥ ‖L_jᵀ V R_j‖_F = ‖Σ_j‖_F. So to remove the first j columns of R removes at least that share of
‖V‖_F². Exact singular vectors would need as many columns or fewer.

**The residual** is of C = V Vᵀ, for each number of columns j = 1…k: f_j bounds what L_j lacks of being
eigenvectors, ‖C − C_j‖₂ with C_j block diagonal in [L_j, L_j⊥], its first block diag(σ_1², …, σ_j²).

- d_out ≤ d_in: Z = C L − L Σ² = V (R Σ) − L Σ² has LᵀZ = 0, so C − C_j has only Z_j in it: f_j = ‖Z_j‖_F.
- d_out > d_in: Z' = Vᵀ V R − R Σ² has RᵀZ' = 0, and C L − L Σ² = V Z' Σ⁻¹. Its columns are at most
  √t ‖z'_i‖/σ_i, with t ≥ ‖V (I − R Rᵀ)‖₂². They have a part in L_j too: f_j is √2 times their norm.

**What follows** is t, from `subspace.largest_beyond`: a bound on ‖(I − L Lᵀ) V‖₂², or on ‖V (I − R Rᵀ)‖₂²
where d_out > d_in. The former is never above the latter: (I − L Lᵀ) V = (I − L Lᵀ) V (I − R Rᵀ) where
V R = L Σ. So no singular value that the iteration missed is above √t. What is outside of the first j < k
columns has no eigenvalue above max(σ_{j+1}², t) + f_k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safelora_vllm.projectors.manifest import ENERGY_ROUNDING
from safelora_vllm.projectors.subspace import CONVERGED, dominant_columns, gram, largest_beyond

_ROWS = 1024  # of V, in float64 at once
_SQUARED = 1e-6  # of σ_1²: larger values are accurate as eigenvalues of a Gram matrix, and that is faster
_SPARE = 4  # columns, where float32 has counted too few
# V was rounded to float32, which moves C by 2⁻²³ σ_1 at most; and products with it, per column, by less than
# 2⁻²² σ_i: 2⁻²⁴ for each of V's rows, of which partial sums are shorter than ‖V‖_F σ_i.
_OF_V, _OF_PRODUCTS = 2.0**-23, 2.0**-22


@dataclass(frozen=True)
class Dominant:
    """The first k singular vectors of V, as columns, and what is certain of them.

    left: L (d_out, k). right: R (d_in, k). shares: of ‖V‖_F² in the first 1…k, (k,). residuals: f_j for
    j = 1…k, (k,). following: t. gram_norm: ‖V Vᵀ‖_F. The latter three for ‖V‖_F = 1. All in float64.
    """

    left: Tensor
    right: Tensor
    shares: Tensor
    residuals: Tensor
    following: float
    gram_norm: float


def dominant(
    v: Tensor, norm: float, energy: float, seed: int, converged: float = CONVERGED
) -> Dominant | None:
    """The fewest Ritz vectors that hold ``energy`` of ‖V‖_F²; None where the spectrum is too flat for it.

    Args:
        v: V (d_out, d_in), float32, its largest element between 2⁻³⁰ and 2³⁰ or so.
        norm: ‖V‖_F, from a float64 sum.
        energy: above 0.
        seed: of the random columns.
        converged: see `subspace.CONVERGED`.
    """
    wide = v.shape[0] <= v.shape[1]
    near = v if wide else v.mT
    generator = torch.Generator().manual_seed(seed)
    matrix = gram(near, norm**2)
    found = dominant_columns(matrix, energy, generator, converged)
    if found is None:
        return None
    basis, far, sizes = _exact_on_one_side(v, norm, found[0][:, : found[1] + _SPARE])
    shares = (sizes**2).cumsum(0)
    k = int((shares < energy - ENERGY_ROUNDING).sum()) + 1
    if k > len(shares):
        return None
    basis, far, sizes, shares = basis[:, :k], far[:, :k], sizes[:k], shares[:k]
    following = largest_beyond(matrix, basis.to(matrix.dtype), generator)
    residuals = _residuals(near, norm, basis, far, sizes, None if wide else following)
    left, right = (basis, far) if wide else (far, basis)
    gram_norm = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    return Dominant(left, right, shares, residuals, following, gram_norm)


def _exact_on_one_side(v: Tensor, norm: float, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """X in the span of columns (n, m), Y (N, m) and σ (m,) with V X = Y Σ or, of a wide V, Vᵀ X = Y Σ."""
    wide = v.shape[0] <= v.shape[1]
    basis = torch.linalg.qr(columns.to(torch.float64)).Q
    product = _times(v, basis, wide) / norm
    values, turn = torch.linalg.eigh(product.mT @ product)
    if float(values[0]) > _SQUARED * float(values[-1]):
        turn, sizes = turn.flip(1), values.flip(0).sqrt()
        return basis @ turn, (product @ turn) / sizes, sizes
    factors = torch.linalg.qr(product)  # small ones, which their squares have lost
    u, sizes, turned = torch.linalg.svd(factors.R)
    return basis @ turned.mT, factors.Q @ u, sizes


def _times(v: Tensor, basis: Tensor, transposed: bool) -> Tensor:
    """V X, or Vᵀ X, in float64, with no float64 copy of all of V."""
    rows, columns = v.shape
    product = basis.new_zeros(columns if transposed else rows, basis.shape[1])
    for start in range(0, rows, _ROWS):
        part = slice(start, min(start + _ROWS, rows))
        wide = v[part].to(torch.float64)
        if transposed:
            product.addmm_(wide.mT, basis[part])
        else:
            torch.mm(wide, basis, out=product[part])
    return product


def _residuals(
    near: Tensor, norm: float, basis: Tensor, far: Tensor, sizes: Tensor, t: float | None
) -> Tensor:
    """f_j for j = 1…k. t: where L is the side that is exact only as V R = L Σ, the bound on what follows."""
    image = near @ (far * sizes).to(near.dtype)
    rest = (image.to(torch.float64) / norm - basis * sizes**2).norm(dim=0) + _OF_PRODUCTS * sizes
    if t is not None:
        rest = math.sqrt(2.0 * t) * rest / sizes.clamp_min(1e-150)
    residuals: Tensor = (rest**2).cumsum(0).sqrt() + _OF_V * sizes[0]
    return residuals
