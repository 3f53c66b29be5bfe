"""The formulas once more, with dense float64 matrices and nothing of the package: the oracle.

W is (d_out, d_in), V = W_aligned − W_base, an adapter adds ΔW = B A with s folded into B.
"""

from __future__ import annotations

import torch
from torch import Tensor


def operator(v: Tensor) -> Tensor:
    """Ĉ = V Vᵀ / ‖V‖_F."""
    return v @ v.T / torch.linalg.matrix_norm(v)


def cosine(x: Tensor, y: Tensor) -> float:
    """The angle of two matrices in the Frobenius inner product."""
    return float((x * y).sum() / (torch.linalg.matrix_norm(x) * torch.linalg.matrix_norm(y)))


def similarity(v: Tensor, a: Tensor, b: Tensor) -> float:
    """cos(Ĉ B A, B A)."""
    delta = b.double() @ a.double()
    return cosine(operator(v) @ delta, delta)


def projected(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Safe LoRA's new ΔW = Ĉ B A."""
    return operator(v) @ b.double() @ a.double()


def removed(v: Tensor, a: Tensor, b: Tensor, energy: float) -> Tensor:
    """Input removal's new ΔW = B (A − A R Rᵀ), R the first right singular vectors of V."""
    _, sizes, right = torch.linalg.svd(v, full_matrices=False)
    shares = (sizes**2).cumsum(0) / (sizes**2).sum()
    k = int((shares < energy).sum()) + 1
    basis = right[:k].T
    wide = a.double()
    return b.double() @ (wide - wide @ basis @ basis.T)


def ratio(x: Tensor, y: Tensor) -> float:
    """‖x‖_F / ‖y‖_F: retained norms and relative norms."""
    return float(torch.linalg.matrix_norm(x) / torch.linalg.matrix_norm(y))


def null_similarity(v: Tensor) -> float:
    """c₀ = tr(Ĉ) / (‖Ĉ‖_F √d_out)."""
    c = operator(v)
    return float(torch.trace(c) / (torch.linalg.matrix_norm(c) * v.shape[0] ** 0.5))
