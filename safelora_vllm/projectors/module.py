"""Figures and tensors of one module: with V's dominant directions only, or all of them up to an energy."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor

from safelora_vllm.errors import CheckpointError
from safelora_vllm.projectors.dominant import dominant
from safelora_vllm.projectors.exact_products import exact_products
from safelora_vllm.projectors.manifest import ENERGY_ROUNDING, THIN
from safelora_vllm.projectors.weight_change import weight_change

Built = tuple[dict[str, Any], dict[str, Tensor]]  # fields of `ModuleEntry` and what the shards hold


def thin_module(name: str, weights: list[Tensor], max_energy: float) -> Built | None:
    """A module without Ĉ and V, or None where it has no projector.

    Args:
        name: of the module. The random numbers depend on it and on V.
        weights: W_base and W_aligned (d_out, d_in). The list is emptied as soon as V is there.
        max_energy: as in `BuildOptions`.

    Raises:
        CheckpointError: a weight is not finite.
    """
    change = weight_change(*weights)
    weights.clear()
    if not _changed(name, change.norm, change.aligned_norm):
        return None
    # Of the values too: whoever knew the random columns could make weights that hide a direction from them.
    content = hashlib.sha256(name.encode())
    content.update(change.v.cpu().contiguous().numpy().data)
    seed = int.from_bytes(content.digest()[:7])
    with exact_products():
        found = dominant(change.v, change.norm / change.scale, max_energy, seed)
    if found is None:
        delta = change.v.to(torch.float64) * change.scale
        return whole_module(name, delta, change.aligned_norm, THIN, torch.float32, max_energy)
    tensors = {
        "input_basis": found.right.to(torch.float32),
        "output_basis": found.left.to(torch.float32),
        "energy": torch.stack([found.shares, found.residuals]),
    }
    figures = {
        "shape": tuple(change.v.shape),
        "form": THIN,
        "norm": change.norm,
        "aligned_norm": change.aligned_norm,
        "null_similarity": 1.0 / (found.gram_norm * math.sqrt(change.v.shape[0])),
        "following": found.following,
    }
    return figures, _on_cpu(tensors)


def whole_module(
    name: str, delta: Tensor, aligned_norm: float, form: str, dtype: torch.dtype, max_energy: float
) -> Built | None:
    """A module of V (d_out, d_in) in float64, or None where it has no projector.

    Args:
        name: for errors.
        delta: V.
        aligned_norm: ‖W_aligned‖_F.
        form: as in `BuildOptions`, or ``thin``.
        dtype: of Ĉ or V.
        max_energy: as in `BuildOptions`.

    Raises:
        CheckpointError: a weight is not finite.
    """
    norm = float(delta.norm())
    if not _changed(name, norm, aligned_norm):
        return None
    d_out, d_in = delta.shape
    wide = d_out <= d_in
    small = delta @ delta.T if wide else delta.T @ delta
    null_similarity = norm**2 / (float(small.norm()) * math.sqrt(d_out))
    if form == "auto":
        form = "dense" if wide else "factored"
    tensors = {}
    if form == "dense":
        tensors["projector"] = ((small if wide else delta @ delta.T) / norm).to(dtype)
    elif form == "factored":
        tensors["delta"] = delta.to(dtype)
    tensors |= _bases(delta, small, wide, max_energy)
    figures = {"shape": (d_out, d_in), "form": form, "norm": norm, "aligned_norm": aligned_norm}
    figures["null_similarity"] = null_similarity
    return figures, _on_cpu(tensors)


def _bases(delta: Tensor, small: Tensor, wide: bool, max_energy: float) -> dict[str, Tensor]:
    """L (d_out, k), R (d_in, k) and the energy shares (k,), from V's smaller Gram matrix.

    Its eigenvectors are V's singular vectors of one side. V takes each to its partner on the other side, and
    QR, which goes from the first column to the last, makes those orthonormal and keeps their order.
    """
    values, vectors = torch.linalg.eigh(small)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    shares = values.cumsum(0) / values.sum()
    k = min(int((shares < max_energy - ENERGY_ROUNDING).sum()) + 1, len(shares))
    near = vectors[:, :k]
    far = torch.linalg.qr((delta.T if wide else delta) @ near).Q
    left, right = (near, far) if wide else (far, near)
    bases = {"input_basis": right.to(torch.float32), "output_basis": left.to(torch.float32)}
    return {**bases, "energy": shares[:k]}


def _changed(name: str, norm: float, aligned_norm: float) -> bool:
    """Whether a module has a projector.

    Raises:
        CheckpointError: a weight is not finite.
    """
    if not (math.isfinite(norm) and math.isfinite(aligned_norm)):
        raise CheckpointError(f"{name}.weight has NaN or infinite values; download the model again")
    return norm > 0.0 and aligned_norm > 0.0


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {part: tensor.cpu().contiguous() for part, tensor in tensors.items()}
