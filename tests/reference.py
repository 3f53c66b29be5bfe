"""The formulas once more, with dense float64 matrices and nothing of the package: the oracle.

W is (d_out, d_in), V = W_aligned − W_base, an adapter adds ΔW = B A with s folded into B.
"""

from __future__ import annotations

import torch
from torch import Tensor


def operator(v: Tensor) -> Tensor:
    """Ĉ = V Vᵀ / ‖V‖_F."""
    return v @ v.T / torch.linalg.matrix_norm(v)


def product(a: Tensor, b: Tensor) -> Tensor:
    """B A."""
    return b.double() @ a.double()


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
    _, basis = bases(v, energy)
    wide = a.double()
    return b.double() @ (wide - wide @ basis @ basis.T)


def bases(v: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    """V's first left and right singular vectors, as columns: the fewest that hold the share of its energy."""
    left, sizes, right = torch.linalg.svd(v, full_matrices=False)
    shares = (sizes**2).cumsum(0) / (sizes**2).sum()
    k = int((shares < energy).sum()) + 1
    return left[:, :k], right[:k].T


def damped(v: Tensor, a: Tensor, b: Tensor, energy: float) -> Tensor:
    """CSULoRA's new ΔW, before its rank is reduced: one block whole, three damped (arXiv 2605.30640)."""
    left, right = bases(v, energy)
    delta = b.double() @ a.double()
    outputs, inputs = left @ left.T, right @ right.T
    both = outputs @ delta @ inputs
    others = [outputs @ delta - both, delta @ inputs - both]
    others.append(delta - both - others[0] - others[1])
    sizes = [float((block**2).sum()) for block in (both, *others)]
    result = both.clone()
    for block, size in zip(others, sizes[1:], strict=True):
        result += block / (1 + size / (sizes[0] + 0.05 * sum(sizes)))
    return result


def truncated(x: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank."""
    left, sizes, right = torch.linalg.svd(x, full_matrices=False)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank]


def ratio(x: Tensor, y: Tensor) -> float:
    """‖x‖_F / ‖y‖_F: retained norms and relative norms."""
    return float(torch.linalg.matrix_norm(x) / torch.linalg.matrix_norm(y))


def null_similarity(v: Tensor) -> float:
    """c₀ = tr(Ĉ) / (‖Ĉ‖_F √d_out)."""
    c = operator(v)
    return float(torch.trace(c) / (torch.linalg.matrix_norm(c) * v.shape[0] ** 0.5))
