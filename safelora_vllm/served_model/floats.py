"""Weights that are floats: plain ones, and FP8 with scales."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safelora_vllm.projectors.weight_files import FLOAT_DTYPES
from safelora_vllm.served_model.stored import Place, Stored

_PIECE = 32 * 1024 * 1024


def plain(place: Place) -> Stored:
    """float64, float32, float16 or bfloat16."""
    name = f"{place.module}.weight" if place.has("weight") else place.module
    info = place.model.tensors[name]
    dtype, width = FLOAT_DTYPES[info.dtype], place.shape[1]
    row, found = width * dtype.itemsize, []
    step = max(1, _PIECE // row)
    for start in range(0, place.shape[0], step):
        part = place.columns[start : start + step]
        data = place.model.raw(name, start * row, len(part) * row)
        found.append(torch.frombuffer(data, dtype=dtype).reshape(len(part), width).gather(1, part))
    values = torch.cat(found).to(torch.float64)
    half = spacing(values, dtype) / 2
    return Stored(info.dtype, values, half, half, half.square() / 3, calibrated=False)


def scaled_fp8(place: Place) -> Stored:
    """FP8 in the forms that `build` reads too."""
    weight = place.model.read(f"{place.module}.weight")
    scaled = place.model.scale(place.module)
    assert scaled is not None  # its dtype is FP8
    scale, (height, width) = scaled
    height, width = height or place.shape[0], width or place.shape[1]
    q = weight.view(torch.uint8)[place.rows, place.columns].view(torch.float8_e4m3fn).to(torch.float64)
    of_blocks = scale.to(torch.float64).reshape(-1, math.ceil(place.shape[1] / width))
    scales = of_blocks[place.rows // height, place.columns // width]
    half = spacing(q, torch.float8_e4m3fn) / 2 * scales.abs()
    return Stored(
        "FP8", q * scales, half, half, half.square() / 3, calibrated=True,
        reach=scales.abs() * torch.finfo(torch.float8_e4m3fn).max, size=width, near=height - 1,
    )  # fmt: skip


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of a dtype around these."""
    limits = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs())
    smallest = math.frexp(limits.smallest_normal)[1]
    return torch.exp2(exponent.clamp_min(smallest).to(torch.float64) - 1) * limits.eps
