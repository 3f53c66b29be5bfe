"""V = W_aligned − W_base of one module in float32, with no float64 copy of all of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_ELEMENTS = 2**22  # of a block of rows
_PLAIN = 2.0**30  # V is scaled where its largest element is above that or below its inverse


class WeightChange(NamedTuple):
    """v: V (d_out, d_in) in float32, divided by ``scale``, a power of two. norm: ‖V‖_F. aligned_norm:
    ‖W_aligned‖_F.
    """

    v: Tensor
    scale: float
    norm: float
    aligned_norm: float


def weight_change(before: Tensor, after: Tensor) -> WeightChange:
    """Of W_base and W_aligned (d_out, d_in). The norms are float64 sums, not finite where a weight is not.

    Each element is rounded once. Of bfloat16 and float16 weights the difference is nearly exact in float32.
    """
    rows = max(1, _ELEMENTS // before.shape[1])
    parts = [slice(start, start + rows) for start in range(0, before.shape[0], rows)]
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    v, largest, scale = before.new_empty(before.shape, dtype=torch.float32), 0.0, 1.0
    aligned_norm = math.hypot(*(_norm(after[part]) for part in parts))
    for part in parts:
        change = after[part].to(wide) - before[part].to(wide)
        largest = max(largest, float(change.abs().max()))
        v[part] = change
    if largest and math.isfinite(aligned_norm) and not 1 / _PLAIN < largest < _PLAIN:
        scale = 2.0 ** math.frexp(largest)[1]
        for part in parts:
            v[part] = (after[part].to(torch.float64) - before[part].to(torch.float64)) / scale
    return WeightChange(v, scale, scale * math.hypot(*(_norm(v[part]) for part in parts)), aligned_norm)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))
