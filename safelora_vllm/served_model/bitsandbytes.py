"""Weights of bitsandbytes: NF4 and FP4 in blocks, and 8-bit integers with a scale for each row.

Source: bitsandbytes 0.50 (``functional.QuantState``, ``nn.modules``). It rounds to the nearest value.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from safelora_vllm.projectors.fp8 import quantisation_of
from safelora_vllm.served_model.stored import FLOATS, Place, Stored

_STATE = "weight.quant_state.bitsandbytes__"
_MOST_STATE = 4096  # bytes of JSON
# The library's kernels have these tables in their code, and do not read the file's.
_TABLES = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ),
    "fp4": tuple(sign * part / 192 for sign in (1, -1) for part in (0, 1, 128, 192, 64, 96, 32, 48)),
}  # fmt: skip
KINDS = tuple(_TABLES)


def four_bits(place: Place, kind: str) -> Stored:
    """``weight`` uint8, two values a byte, the first in the high bits.

    Raises:
        CheckpointError: tensors that do not fit.
    """
    _check_config(place, "load_in_4bit")
    d_out, d_in = place.shape
    try:
        state = _state(place, kind)
        size, shape = int(state["blocksize"]), tuple(state["shape"])
        nested = int(state.get("nested_blocksize", 1)), float(state.get("nested_offset", 0.0))
        if shape != place.shape or size < 1 or nested[0] < 1:
            raise ValueError(f"shape {shape}, blocks of {size}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise place.cannot(f"{kind} with a damaged quant_state ({error!r:.100})") from error
    count = d_out * d_in
    blocks = -(-count // size)
    data = place.tensor("weight", ["U8"], (-(-count // 2), 1), (1, -(-count // 2))).flatten()
    flat = place.rows * d_in + place.columns
    code = (data[flat // 2].to(torch.int64) >> (4 * (1 - flat % 2))) & 15
    table = torch.tensor(_TABLES[kind], dtype=torch.float64)
    if not torch.allclose(
        place.tensor("weight.quant_map", FLOATS, (16,)).to(torch.float64), table, atol=1e-3
    ):
        raise place.cannot(f"{kind} with another quant_map than bitsandbytes has")
    largest, slack = _largest(place, flat // size, blocks, *nested)
    value, below, above = (part[code] for part in _cells(table))
    unsure = value.abs() * slack
    expected = (below**3 + above**3) / (3 * (below + above))
    return Stored(
        kind.upper(), value * largest, below * largest + unsure, above * largest + unsure,
        expected * largest.square(), calibrated=False,
        reach=largest.abs(), size=size, near=-(-size // d_in) if d_in % size else 0,
    )  # fmt: skip


def eight_bits(place: Place) -> Stored:
    """``weight`` int8 and ``SCB`` (d_out,), the largest absolute value of each row.

    Raises:
        CheckpointError: tensors that do not fit.
    """
    _check_config(place, "load_in_8bit")
    weight = place.tensor("weight", ["I8"], place.shape)
    scale = place.tensor("SCB", FLOATS, place.shape[:1]).to(torch.float64).abs()[:, None] / 127
    half = (scale / 2).expand(place.columns.shape)
    values = weight[place.rows, place.columns].to(torch.float64) * scale
    reach = half * 254
    return Stored(
        "bitsandbytes, int8", values, half, half, half.square() / 3, calibrated=False,
        reach=reach, size=place.shape[1],
    )  # fmt: skip


def kind_of(place: Place) -> str | None:
    """``nf4`` or ``fp4``; None for other weights."""
    return next((kind for kind in KINDS if place.has(_STATE + kind)), None)


def _check_config(place: Place, key: str) -> None:
    """Refuse tensors that the config says are others: vLLM decides by the config."""
    if quantisation_of(place.model.config).get(key) is not True:
        raise place.cannot(f"packed by bitsandbytes, where its config does not say {key}")


def _state(place: Place, kind: str) -> Any:
    """The JSON of a ``quant_state``, which is read only where it is short."""
    if len(shape := place.shape_of(_STATE + kind)) != 1 or shape[0] > _MOST_STATE:
        raise ValueError(f"shape {shape}: expected at most {_MOST_STATE} bytes")
    return json.loads(bytes(place.tensor(_STATE + kind, ["U8"]).tolist()))


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
