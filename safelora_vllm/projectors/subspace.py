"""The dominant eigenvectors of a positive semidefinite matrix C (n, n) of trace 1, without all others.

Chebyshev-filtered subspace iteration in float32: T_p of C, shifted and scaled so that [0, a] becomes [-1, 1],
with a the block's last Ritz value, makes all eigenvalues above a larger by cosh(p·acosh(2λ/a − 1)). The block
begins as Gaussian columns. It gets more of them until it holds the energy, with some columns to spare.

Source: Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219 (2006).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_ROWS = 512  # of C that are multiplied at once
_FIRST, _SPARE, _MORE = 32, 16, 1.3  # columns at first; beyond the wanted ones, and times as many
_LARGEST = 0.25  # of n: where more columns are needed, all eigenvectors are cheaper
_GROWTH = 1.5  # times the fewest columns that can hold what is missing
_ROUNDS = 20
CONVERGED = 1e-2  # ‖CX − XΛ‖_F of the wanted columns, relative to the last one's eigenvalue
# Of the largest eigenvalue's growth in a round: above it rounding would cover the block's last columns.
_FILTER, _HIGHEST_DEGREE = math.log(1e7), 8
_PROBES, _POWERS = 32, 12
# χ² with 32 degrees of freedom is below 32·0.044 with a probability of 1e-15: (y e^(1-y))^16 for y = 0.044.
_UNLIKELY = 0.044
# What rounding does to C, as a share of its trace, and to the products with it, relative to them.
_ROUNDING, _PRODUCTS = 2.0**-20, 1.001


def gram(near: Tensor, norm_squared: float) -> Tensor:
    """``X Xᵀ/‖X‖_F²`` (n, n) of X (n, N). Only one triangle is multiplied."""
    n = near.shape[0]
    product = near.new_empty(n, n)
    for start in range(0, n, _ROWS):
        stop = min(start + _ROWS, n)
        product[start:stop, :stop] = near[start:stop] @ near[:stop].mT
        product[:start, start:stop] = product[start:stop, :start].mT
    return product.div_(norm_squared)


def dominant_columns(
    matrix: Tensor, energy: float, generator: torch.Generator, converged: float = CONVERGED
) -> tuple[Tensor, int] | None:
    """Orthonormal Ritz vectors (n, m), the dominant ones first, and how many hold ``energy`` of the trace.

    None where a quarter of n columns does not hold it: then the spectrum is flat.

    Args:
        matrix: C, float32.
        energy: a share of the trace.
        generator: of the first columns, on the CPU.
        converged: how far off an invariant subspace they may be, see `CONVERGED`.
    """
    limit = int(_LARGEST * matrix.shape[0])
    if limit < 1:
        return None
    block = _orthonormal(matrix @ (matrix @ _gaussian(matrix, min(_FIRST, limit), generator)))
    for _ in range(_ROUNDS):
        block, image, values = _ritz(matrix, block)
        shares, held = values.cumsum(0), block.shape[1]
        wanted = int((shares < energy).sum()) + 1
        if wanted <= held:
            rest = image[:, :wanted] - block[:, :wanted] * values[:wanted]
            if float(rest.norm()) <= converged * float(values[wanted - 1]):
                return block, wanted
            columns = max(int(_MORE * wanted), wanted + _SPARE)
        else:
            missing = (energy - float(shares[-1])) / max(float(values[-1]), 1e-9)
            columns = held + max(held // 2, math.ceil(_GROWTH * min(missing, limit)))
        columns = min(columns, limit)
        if columns > held:
            block = _grown(matrix, block, _gaussian(matrix, columns - held, generator))
        elif wanted > held:
            return None
        else:
            block = _filtered(matrix, block[:, :columns], image[:, :columns], values[:columns])
    return (block, wanted) if wanted <= held else None


def largest_beyond(matrix: Tensor, basis: Tensor, generator: torch.Generator) -> float:
    """A bound on the largest eigenvalue of (I − X Xᵀ) C (I − X Xᵀ), X (n, k) orthonormal.

    With A that matrix, u its first eigenvector and Z (n, 32) Gaussian, ‖Aᵖ Z‖₂ is at least λᵖ ‖uᵀZ‖, where
    ‖uᵀZ‖² is χ² with 32 degrees of freedom. So the bound fails with a probability of 1e-15, for any C and X
    that were chosen without knowledge of Z.

    Source: as Halko, Martinsson and Tropp, SIAM Review 53 (2011), section 4.3, with powers.
    """

    def outside(x: Tensor) -> Tensor:
        return x - basis @ (basis.mT @ x)

    probes, logarithm = outside(_gaussian(matrix, _PROBES, generator)), 0.0
    for _ in range(_POWERS):
        probes = outside(matrix @ probes)
        size = float(probes.norm())
        if size == 0.0:
            return _ROUNDING
        probes, logarithm = probes / size, logarithm + math.log(size)
    wide = probes.to(torch.float64)
    spectral = float(torch.linalg.eigvalsh(wide.mT @ wide)[-1])
    logarithm += 0.5 * math.log(spectral / (_UNLIKELY * _PROBES))
    return math.exp(logarithm / _POWERS) * _PRODUCTS + _ROUNDING


def _ritz(matrix: Tensor, block: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz vectors X in the span of a block, C X, and their values, falling."""
    image = matrix @ block
    values, turn = torch.linalg.eigh(block.mT @ image)
    turn = turn.flip(1)
    return block @ turn, image @ turn, values.flip(0).clamp_min(0.0)


def _filtered(matrix: Tensor, block: Tensor, image: Tensor, values: Tensor) -> Tensor:
    """T_p(2C/a − I) X for Ritz vectors X, orthonormal again: QR takes them in order, the dominant first."""
    first, last = float(values[0]), max(float(values[-1]), 1e-6 * float(values[0]))
    degree = int(_FILTER / math.acosh(max(2 * first / last - 1, 1.0 + 1e-6)))
    before, now = block, image * (2 / last) - block
    for _ in range(min(max(degree, 1), _HIGHEST_DEGREE) - 1):
        before, now = now, (matrix @ now) * (4 / last) - 2 * now - before
    return _orthonormal(now)


def _grown(matrix: Tensor, block: Tensor, fresh: Tensor) -> Tensor:
    """A block with more columns, which lean towards the dominant eigenvectors outside of it."""
    for _ in range(2):
        fresh = matrix @ (fresh - block @ (block.mT @ fresh))
    return _orthonormal(torch.cat([block, fresh], dim=1))


def _orthonormal(x: Tensor) -> Tensor:
    orthonormal: Tensor = torch.linalg.qr(x / x.norm(dim=0).clamp_min(1e-30)).Q
    return orthonormal


def _gaussian(like: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape[0], columns, generator=generator).to(like.device)
