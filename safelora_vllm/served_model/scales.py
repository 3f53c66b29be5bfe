"""Whether the scales of a served weight are those that a tool would choose for the aligned weights.

A step explains every weight that is smaller than half of it, and clipping every weight that is larger than
the scale can stand for. So both are bounded by the aligned weights, not by what the files say.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad

from safelora_vllm.served_model.stored import Stored

CELL = 1.02  # scales are rounded too, after the weights were divided by them
# A scale reaches so many times as far as the largest aligned value that has it. AWQ and GPTQ change weights
# before they choose scales, and scales that are powers of two reach up to twice as far.
_REACH, _REACH_CALIBRATED = 1.25, 2.0


def limit(largest: Tensor, stored: Stored) -> Tensor:
    """How far the scales of each row may reach (rows, 1), by the aligned rows' largest values."""
    around, near = largest, stored.near
    if near >= len(largest) - 1:
        around = largest.amax().expand(len(largest))
    elif near:
        around = max_pool1d(largest[None], 2 * near + 1, stride=1, padding=near)[0]
    return around[:, None] * (_REACH_CALIBRATED if stored.calibrated else _REACH)


def smallest(factors: Tensor, size: int) -> Tensor:
    """The smallest factor of each group of columns."""
    missing = -len(factors) % size
    return pad(factors, (0, missing), value=torch.inf).reshape(-1, size).amin(1)


def counts(stored: Stored, limit: Tensor, scale: Tensor, aligned: Tensor) -> tuple[int, int]:
    """How many samples have a scale that is too large, and too small, for the aligned weights."""
    if stored.reach is None:
        return 0, 0
    coarse = (stored.reach > limit) & (aligned != 0)  # a group of zeros may have any scale
    clipped = torch.zeros_like(coarse)
    if stored.clipped is not None:
        far = (stored.values * scale - aligned).abs() > stored.reach * scale.abs() * CELL
        clipped = stored.clipped & far
    return int(coarse.sum()), int(clipped.sum())
