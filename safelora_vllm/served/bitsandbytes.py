"""Weights of bitsandbytes: NF4 and FP4 in blocks, and 8-bit integers with a scale for each row.

Source: bitsandbytes 0.50 (``functional.QuantState``, ``nn.modules``). It rounds to the nearest value.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from safelora_vllm.served.stored import FLOATS, Place, Stored

_STATE = "weight.quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")


def four_bits(place: Place, kind: str) -> Stored:
    """``weight`` uint8, two values a byte, the first in the high bits.

    Raises:
        CheckpointError: tensors that do not fit.
    """
    d_out, d_in = place.shape
    try:
        state = json.loads(bytes(place.tensor(_STATE + kind, ["U8"]).tolist()))
        size, shape = int(state["blocksize"]), tuple(state["shape"])
        nested = int(state.get("nested_blocksize", 1)), float(state.get("nested_offset", 0.0))
        if shape != place.shape or size < 1 or nested[0] < 1:
            raise ValueError(f"shape {shape}, blocks of {size}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise place.cannot(f"{kind} with a damaged quant_state ({error!r:.100})") from error
    count = d_out * d_in
    blocks = -(-count // size)
    data = place.tensor("weight", ["U8"], (-(-count // 2), 1), (1, -(-count // 2))).flatten()
    flat = place.rows * d_in + place.columns
    code = (data[flat // 2].to(torch.int64) >> (4 * (1 - flat % 2))) & 15
    table = place.tensor("weight.quant_map", FLOATS, (16,)).to(torch.float64)
    largest, slack = _largest(place, flat // size, blocks, *nested)
    value, below, above = (part[code] for part in _cells(table))
    unsure = value.abs() * slack
    expected = (below**3 + above**3) / (3 * (below + above))
    return Stored(
        kind.upper(), value * largest, below * largest + unsure, above * largest + unsure,
        expected * largest.square(), calibrated=False,
    )  # fmt: skip


def eight_bits(place: Place) -> Stored:
    """``weight`` int8 and ``SCB`` (d_out,), the largest absolute value of each row.

    Raises:
        CheckpointError: tensors that do not fit.
    """
    weight = place.tensor("weight", ["I8"], place.shape)
    scale = place.tensor("SCB", FLOATS, place.shape[:1]).to(torch.float64).abs()[:, None] / 127
    half = (scale / 2).expand(place.columns.shape)
    values = weight[place.rows, place.columns].to(torch.float64) * scale
    return Stored("bitsandbytes, int8", values, half, half, half.square() / 3, calibrated=False)


def kind_of(place: Place) -> str | None:
    """``nf4`` or ``fp4``; None for other weights."""
    return next((kind for kind in KINDS if place.has(_STATE + kind)), None)


def _largest(place: Place, block: Tensor, blocks: int, size: int, offset: float) -> tuple[Tensor, Tensor]:
    """The largest absolute value of each sample's block, and how unsure it is where it is rounded too."""
    if not place.has("weight.nested_absmax"):
        plain = place.tensor("weight.absmax", FLOATS, (blocks,)).to(torch.float64)[block]
        return plain, torch.zeros_like(plain)
    code = place.tensor("weight.absmax", ["U8"], (blocks,)).to(torch.int64)[block]
    nested = place.tensor("weight.nested_absmax", FLOATS, (-(-blocks // size),)).to(torch.float64)
    table = place.tensor("weight.nested_quant_map", FLOATS, (256,)).to(torch.float64)
    value, below, above = (part[code] for part in _cells(table))
    scale = nested[block // size]
    return (value * scale + offset).abs(), torch.maximum(below, above) * scale.abs()


def _cells(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each value of a table, and half of the distance to its neighbours. Nothing is beyond both ends."""
    order = table.argsort()
    half = table[order].diff() / 2
    below, above = torch.zeros_like(table), torch.zeros_like(table)
    below[order[1:]], above[order[:-1]] = half, half
    # One value that stands twice in a table, as ±0 does, has the cell of both.
    for value in set(table.tolist()):
        alike = table == value
        below[alike], above[alike] = below[alike].max(), above[alike].max()
    return table, below, above
