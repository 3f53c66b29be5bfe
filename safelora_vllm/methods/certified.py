"""An interval that is certain to hold a similarity, from V's dominant output directions alone.

With w_i = σ_i²/‖V‖_F², U_k = L the first k left singular vectors and ‖BA‖_F = 1, let x_i = ‖u_iᵀBA‖² and

    N = Σ_{i≤k} w_i x_i,  D² = Σ_{i≤k} w_i² x_i,  q = 1 − Σ_{i≤k} x_i,  t ≥ w_i for all i > k

The similarity is (N + δ)/√(D² + ε), where δ = Σ_{i>k} w_i x_i and ε = Σ_{i>k} w_i² x_i are unknown. But
0 ≤ δ ≤ tq, and δ²/q ≤ ε ≤ tδ: the first by Cauchy and Schwarz, the second as no w_i is above t there.

With the largest ε the quotient (N + δ)/√(D² + tδ) is least at δ = N − 2D²/t, or where [0, tq] ends before
that. With the smallest ε the quotient (N + δ)/√(D² + δ²/q) is largest at δ = sq, s = min(t, D²/N):

    (N + δ)/√(D² + tδ) ≤ similarity ≤ (N + sq)/√(D² + s²q)

Where t is w_{k+1} itself, D² ≥ tN, and both are at the ends: δ = 0 and s = t. But t may be a bound that is
larger than some w_i inside: see `projectors.dominant`.

Where L is approximate, all of that holds for an operator C₀ beside C = V Vᵀ/‖V‖_F². C₀ is block diagonal in
[L, L_⊥]: its first block is diag(w), the other has no eigenvalue above t. `projectors.dominant` derives t and
f ≥ ‖C − C₀‖₂. With a = ⟨C₀BA, BA⟩ and b = ‖C₀BA‖ the similarity is (a + α)/(b + β), |α| and |β| at most f. As
a ≤ b and D ≤ b,

    |(a + α)/(b + β) − a/b| = |αb − βa|/(b(b + β)) ≤ 2f/(D − f)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from safelora_vllm.methods.selection import Interval
from safelora_vllm.projectors.projector import Spectrum

# Bound on the error of each √x_i, for a coherence of 1 (see `lowrank.coherence`): 2⁻²⁴ from the rounding of
# u_i to float32, and less from float64 sums. Their terms are larger than ‖BA‖² by 1/coherence.
_ROUNDING = 2.0**-23


def sums(b: Tensor, gram: Tensor, basis: Tensor, weights: Tensor) -> Tensor:
    """N, D² and Σx_i, not yet divided by ‖BA‖², as (3,) float64. All may have leading dimensions of modules.

    Args:
        b: B (d_out, r).
        gram: A Aᵀ (r, r), float64.
        basis: L (d_out, k).
        weights: (3, k) float64, see `Spectrum.weights`.
    """
    parts = basis.to(torch.float64).mT @ b.to(torch.float64)
    shares = ((parts @ gram) * parts).sum(-1)
    return (weights @ shares[..., None])[..., 0]


def interval(known: Sequence[float], norm_squared: float, coherence: float, spectrum: Spectrum) -> Interval:
    """The interval that holds the similarity of a delta with a rank that is not zero, NaN if not finite.

    Args:
        known: N, D² and Σx_i of `sums`.
        norm_squared: ‖BA‖².
        coherence: see `lowrank.coherence`.
        spectrum: of the directions of L.
    """
    if not all(map(math.isfinite, (norm_squared, *known))):
        return Interval(math.nan, math.nan)
    if norm_squared == 0.0:  # ranks that cancel wholly have no direction
        return Interval(0.5, 0.5)
    n, d_squared, inside = (max(value, 0.0) / norm_squared for value in known)
    d, rounding = math.sqrt(d_squared), _ROUNDING / math.sqrt(max(coherence, sys.float_info.min))
    slack_d, slack_q = rounding * spectrum.norm, 2 * rounding * math.sqrt(len(spectrum.sizes))
    if d <= slack_d + spectrum.residual:
        return Interval(0.5, 0.5)
    q = min(1.0, max(0.0, 1.0 - inside) + slack_q)
    slack = (d * slack_q + slack_d) / (d - slack_d)
    slack += 2 * spectrum.residual / (d - slack_d - spectrum.residual)
    t = spectrum.following
    least = min(max(n - 2.0 * d_squared / t, 0.0), t * q) if t else 0.0
    largest = min(t, d_squared / n) if n else t
    low = max(0.0, (n + least) / math.sqrt(d_squared + t * least) - slack)
    high = min(1.0, (n + largest * q) / math.sqrt(d_squared + largest**2 * q) + slack)
    if not low <= high:  # by rounding
        return Interval(0.5, 0.5)
    return Interval((low + high) / 2, (high - low) / 2)


def null_interval(spectrum: Spectrum, d_out: int) -> Interval:
    """The interval of a random adapter, whose share in each of the d_out directions is 1/d_out."""
    sums = (spectrum.weights.sum(dim=1) / d_out).tolist()
    return interval(sums, 1.0, 1.0, spectrum)
