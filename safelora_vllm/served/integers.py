"""Weights that are integers with scales: GPTQ, AWQ and compressed-tensors.

Sources: AutoGPTQ's ``qlinear`` and vLLM 0.32's ``gptq`` for the zero point, AutoAWQ's ``WQLinear_GEMM``,
compressed-tensors 0.17 (``compressors``). W (d_out, d_in) = (q − z)·s, with a scale for a group of columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safelora_vllm.projectors.fp8 import quantisation_of
from safelora_vllm.served.stored import FLOATS, Place, Stored, packed, steps

_AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # column j of eight is in this nibble


def gptq(place: Place) -> Stored:
    """``qweight`` (d_in·bits/32, d_out), packed along d_in.

    Raises:
        CheckpointError: other bits than 2, 4 or 8, or tensors that do not fit.
    """
    config = quantisation_of(place.model.config)
    bits = _bits(place, config.get("bits"))
    d_out, d_in = place.shape
    scales = place.tensor("scales", FLOATS)
    groups = _groups(place, len(scales), d_in)
    scales = place.tensor("scales", FLOATS, (groups, d_out))
    words = place.tensor("qweight", ["I32"], (d_in * bits // 32, d_out))
    zeros = place.tensor("qzeros", ["I32"], (groups, d_out * bits // 32))
    group = place.columns // -(-d_in // groups)
    if place.has("g_idx"):
        order = place.tensor("g_idx", ["I32"], (d_in,)).to(torch.int64)
        if bool(((order < 0) | (order >= groups)).any()):
            raise place.cannot(f"GPTQ with a g_idx beyond its {groups} groups")
        group = order[place.columns]
    rows = place.rows.expand(place.columns.shape)
    codes = packed(words.T, rows, place.columns, bits)
    # The first version of the format stores z − 1.
    zero = packed(zeros, group, rows, bits) + (0 if config.get("checkpoint_format") == "gptq_v2" else 1)
    return steps(f"GPTQ, {bits} bits", codes, zero, scales[group, rows], (0, 2**bits - 1))


def awq(place: Place) -> Stored:
    """``qweight`` (d_in, d_out/8), packed along d_out in AutoAWQ's order of columns.

    Raises:
        CheckpointError: other bits than 4, another version than GEMM, or tensors that do not fit.
    """
    config = quantisation_of(place.model.config)
    version = str(config.get("version", "gemm")).lower()
    if _bits(place, config.get("bits", config.get("w_bit"))) != 4 or version != "gemm":
        raise place.cannot(f"AWQ {version:.20} with {config.get('bits')!r:.20} bits")
    d_out, d_in = place.shape
    scales = place.tensor("scales", FLOATS)
    groups = _groups(place, len(scales), d_in)
    scales = place.tensor("scales", FLOATS, (groups, d_out))
    words = place.tensor("qweight", ["I32"], (d_in, d_out // 8))
    zeros = place.tensor("qzeros", ["I32"], (groups, d_out // 8))
    group = place.columns // (d_in // groups)
    rows = place.rows.expand(place.columns.shape)
    nibble = rows // 8 * 8 + _AWQ_ORDER[rows % 8]
    codes, zero = packed(words, place.columns, nibble, 4), packed(zeros, group, nibble, 4)
    return steps("AWQ, 4 bits", codes, zero, scales[group, rows], (0, 15))


def packed_tensors(place: Place) -> Stored:
    """``weight_packed`` (d_out, d_in·bits/32) of compressed-tensors, packed along d_in.

    Raises:
        CheckpointError: other bits than 4 or 8, or tensors that do not fit.
    """
    d_out, d_in = place.shape
    width = (place.shape_of("weight_packed") or (0, 0))[-1]
    bits = _bits(place, width * 32 // d_in)
    words = place.tensor("weight_packed", ["I32"], (d_out, -(-d_in * bits // 32)))
    scale, row, group = _scale(place)
    codes = packed(words, place.rows.expand(place.columns.shape), place.columns, bits)
    zero: Tensor = torch.tensor(2 ** (bits - 1))
    if place.has("weight_zero_point"):
        points = place.tensor("weight_zero_point", ["I32"], (-(-d_out * bits // 32), scale.shape[1]))
        zero = packed(points.T, group, row, bits)
    return steps(f"compressed-tensors, {bits} bits", codes, zero, scale[row, group], (0, 2**bits - 1))


def integer_tensors(place: Place) -> Stored:
    """``weight`` int8 (d_out, d_in) of compressed-tensors.

    Raises:
        CheckpointError: fewer bits than 8, or tensors that do not fit.
    """
    groups = (quantisation_of(place.model.config).get("config_groups") or {}).values()
    schemes = [group.get("weights") or {} for group in groups if isinstance(group, Mapping)]
    if any(scheme.get("num_bits", 8) != 8 for scheme in schemes):
        raise place.cannot("integers of several sizes")
    weight = place.tensor("weight", ["I8"], place.shape)
    scale, row, group = _scale(place)
    zero = torch.tensor(0)
    if place.has("weight_zero_point"):
        points = place.tensor("weight_zero_point", ["I8"], scale.shape, scale.flatten().shape)
        zero = points.reshape(scale.shape)[row, group]
    codes = weight[place.rows, place.columns].to(torch.int64)
    return steps("compressed-tensors, int8", codes, zero, scale[row, group], (-128, 127))


def _scale(place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """``weight_scale`` (d_out or 1, groups), and the row and the group in it of each sample."""
    d_out, d_in = place.shape
    scale = place.tensor("weight_scale", FLOATS)
    if scale.numel() == 1:
        scale = scale.reshape(1, 1)
    elif scale.numel() == d_out:
        scale = scale.reshape(d_out, 1)
    if scale.ndim != 2 or scale.shape[0] not in (1, d_out):
        raise place.cannot(f"scaled by a weight_scale {tuple(scale.shape)}")
    groups = _groups(place, scale.shape[1], d_in)
    group = place.columns // -(-d_in // groups)
    if place.has("weight_g_idx"):
        order = place.tensor("weight_g_idx", ["I32"], (d_in,)).to(torch.int64)
        if bool(((order < -1) | (order >= groups)).any()):
            raise place.cannot(f"scaled with a weight_g_idx beyond its {groups} groups")
        if bool((order >= 0).all()):  # −1 stands for columns in their order
            group = order[place.columns]
    row = place.rows.expand(place.columns.shape) if scale.shape[0] == d_out else torch.zeros_like(group)
    return scale, row, group


def _groups(place: Place, groups: int, d_in: int) -> int:
    if not 0 < groups <= d_in or -(-d_in // -(-d_in // groups)) != groups:
        raise place.cannot(f"scaled in {groups} groups of {d_in} columns")
    return groups


def _bits(place: Place, bits: Any) -> int:
    if bits not in (2, 4, 8):
        raise place.cannot(f"packed in {bits!r:.20} bits: expected 2, 4 or 8")
    return int(bits)
