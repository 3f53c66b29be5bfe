"""Weights that are integers with scales: GPTQ, AWQ and compressed-tensors.

Sources: AutoGPTQ's ``qlinear``, AutoAWQ's ``WQLinear_GEMM``, compressed-tensors 0.17 (``compressors``).
W (d_out, d_in) = (q − z)·s, with a scale for a group of columns.

vLLM 0.32 does not read everything that these layouts store: it has a fixed zero point where the config says
that weights are symmetric, no order of columns, and the sizes of the config instead of the tensors'. Where
these disagree, the values in the files are not those that are served, and the form cannot be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from safelora_vllm.errors import CheckpointError
from safelora_vllm.projectors.fp8 import only_scaled, quantisation_of
from safelora_vllm.served_model.stored import FLOATS, Place, Stored, packed, steps

_AWQ_KEYS = (("w_bit", "bits"), ("q_group_size", "group_size"))
_AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # column j of eight is in this nibble


def gptq(place: Place) -> Stored:
    """``qweight`` (d_in·bits/32, d_out), packed along d_in.

    Raises:
        CheckpointError: other bits than 4 or 8, tensors that do not fit, or what vLLM does not read.
    """
    config = quantisation_of(place.model.config)
    bits = _bits(place, config.get("bits"))
    if several := [key for key in ("dynamic", "extra_config") if config.get(key)]:
        raise place.cannot(f"GPTQ with a {several[0]}, so that layers are packed in several ways")
    d_out, d_in = place.shape
    size = _size(place, config.get("group_size"))
    groups = d_in // size
    scales = place.tensor("scales", FLOATS, (groups, d_out))
    words = place.tensor("qweight", ["I32"], (d_in * bits // 32, d_out))
    zeros = place.tensor("qzeros", ["I32"], (groups, d_out * bits // 32))
    _in_order(place, "g_idx", size)
    middle = 2 ** (bits - 1)
    # The first version of the format stores z − 1.
    stored = middle if config.get("checkpoint_format") == "gptq_v2" else middle - 1
    if not bool((_every(zeros, bits) == stored).all()):
        raise place.cannot(f"GPTQ with zero points other than {middle}, which vLLM does not read")
    rows = place.rows.expand(place.columns.shape)
    codes = packed(words.T, rows, place.columns, bits)
    scale = scales[place.columns // size, rows]
    return steps(f"GPTQ, {bits} bits", codes, torch.tensor(middle), scale, (0, 2**bits - 1), size)


def awq(place: Place) -> Stored:
    """``qweight`` (d_in, d_out/8), packed along d_out in AutoAWQ's order of columns.

    Raises:
        CheckpointError: other bits than 4, another version than GEMM, no zero points, or tensors that do
            not fit.
    """
    config = quantisation_of(place.model.config)
    version = str(config.get("version", "gemm")).lower()
    bits, size = (config.get(short, config.get(long)) for short, long in _AWQ_KEYS)  # as vLLM reads them
    if _bits(place, bits) != 4 or version != "gemm":
        raise place.cannot(f"AWQ {version:.20} with {bits!r:.20} bits")
    if config.get("zero_point") is not True:
        raise place.cannot("AWQ without zero points")
    d_out, d_in = place.shape
    size = _size(place, size)
    groups = d_in // size
    scales = place.tensor("scales", FLOATS, (groups, d_out))
    words = place.tensor("qweight", ["I32"], (d_in, d_out // 8))
    zeros = place.tensor("qzeros", ["I32"], (groups, d_out // 8))
    group = place.columns // size
    rows = place.rows.expand(place.columns.shape)
    nibble = rows // 8 * 8 + _AWQ_ORDER[rows % 8]
    codes, zero = packed(words, place.columns, nibble, 4), packed(zeros, group, nibble, 4)
    return steps("AWQ, 4 bits", codes, zero, scales[group, rows], (0, 15), size)


def packed_tensors(place: Place) -> Stored:
    """``weight_packed`` (d_out, d_in·bits/32) of compressed-tensors, packed along d_in.

    Raises:
        CheckpointError: other bits than 4 or 8, tensors that do not fit, or what vLLM does not read.
    """
    (d_out, d_in), scheme = place.shape, _scheme(place)
    bits = _bits(place, scheme.get("num_bits"))
    words = place.tensor("weight_packed", ["I32"], (d_out, -(-d_in * bits // 32)))
    if scheme.get("inputs"):
        raise place.cannot(f"packed in {bits} bits for quantised inputs")
    channel = scheme.get("strategy") == "channel"
    size = d_in if channel else _size(place, scheme.get("group_size"))
    scale = place.tensor("weight_scale", FLOATS, (d_out, d_in // size))
    _in_order(place, "weight_g_idx", size)
    row, group = place.rows.expand(place.columns.shape), place.columns // size
    codes = packed(words, row, place.columns, bits)
    middle = 2 ** (bits - 1)
    zero: Tensor = torch.tensor(middle)
    if not scheme.get("symmetric", True) or place.has("weight_zero_point"):
        points = place.tensor("weight_zero_point", ["I32"], (-(-d_out * bits // 32), scale.shape[1]))
        every = _every(points.T, bits)[:, :d_out]
        if scheme.get("symmetric", True) and not bool((every == middle).all()):
            raise place.cannot(f"symmetric by its config, with zero points other than {middle}")
        zero = every[group, row]
    form = f"compressed-tensors, {bits} bits"
    return steps(form, codes, zero, scale[row, group], (0, 2**bits - 1), size)


def integer_tensors(place: Place) -> Stored:
    """``weight`` int8 (d_out, d_in) of compressed-tensors, with a scale for each row or for all.

    Raises:
        CheckpointError: fewer bits than 8, tensors that do not fit, or zero points, which vLLM does not read.
    """
    (d_out, d_in), scheme = place.shape, _scheme(place)
    if (bits := scheme.get("num_bits", 8)) != 8:
        raise place.cannot(f"int8 for {bits!r:.20} bits")
    weight = place.tensor("weight", ["I8"], place.shape)
    shapes = ((d_out, 1), (d_out,), (1, 1), (1,), ())
    scale = place.tensor("weight_scale", FLOATS, *shapes).reshape(-1, 1)
    if len(scale) != (1 if scheme.get("strategy") == "tensor" else d_out):
        raise place.cannot(f"int8 with {len(scale)} scales for strategy {scheme.get('strategy')!r:.20}")
    _in_order(place, "weight_g_idx", d_in)
    if place.has("weight_zero_point") and bool(place.tensor("weight_zero_point", ["I8"], *shapes).any()):
        raise place.cannot("int8 with zero points, which vLLM does not read")
    codes = weight[place.rows, place.columns].to(torch.int64)
    return steps(
        "compressed-tensors, int8", codes, torch.tensor(0), scale.expand(d_out, 1), (-128, 127),
        size=d_in, near=0 if len(scale) == d_out else d_out,
    )  # fmt: skip


def _scheme(place: Place) -> Mapping[str, Any]:
    """How the config says that weights are packed, and of ``inputs``. All layers have to be alike.

    Raises:
        CheckpointError: they are not, or weights are rotated or sparse.
    """
    config = quantisation_of(place.model.config)
    try:
        only_scaled(config, place.model.folder)
    except CheckpointError as error:
        raise place.cannot("rotated or sparse by its config") from error
    groups = (config.get("config_groups") or {}).values()
    found = [
        {**(group.get("weights") or {}), "inputs": bool(group.get("input_activations"))}
        for group in groups
        if isinstance(group, Mapping)
    ]
    if not found or any(scheme != found[0] for scheme in found):
        raise place.cannot(f"packed in one of {len(found)} ways by its config: expected one")
    return found[0]


def _every(words: Tensor, bits: int) -> Tensor:
    """All numbers (n, m·32/bits) of words (n, m)."""
    index = torch.arange(words.shape[1] * 32 // bits)
    return packed(words, torch.arange(len(words))[:, None], index, bits)


def _in_order(place: Place, suffix: str, size: int) -> None:
    """Refuse columns in another order than that of their groups: vLLM does not read it."""
    if not place.has(suffix):
        return
    d_in = place.shape[1]
    found = place.tensor(suffix, ["I32", "I64"], (d_in,)).to(torch.int64)
    # In compressed-tensors −1 stands for columns in their order.
    unset = suffix == "weight_g_idx" and bool((found == -1).all())
    if not unset and not torch.equal(found, torch.arange(d_in) // size):
        raise place.cannot(f"packed with columns in another order ({suffix}), which vLLM does not read")


def _size(place: Place, size: Any) -> int:
    """How many columns have one scale. −1 stands for all."""
    d_in = place.shape[1]
    if type(size) is not int or size < -1 or size == 0 or d_in % size:
        raise place.cannot(f"scaled in groups of {size!r:.20} of {d_in} columns by its config")
    return d_in if size == -1 else size


def _bits(place: Place, bits: Any) -> int:
    if bits not in (4, 8) or type(bits) is not int:
        raise place.cannot(f"packed in {bits!r:.20} bits: expected 4 or 8")
    return bits
