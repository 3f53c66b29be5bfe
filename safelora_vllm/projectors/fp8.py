"""FP8 weights of a checkpoint: where their scales are, and the values that both stand for.

W[i, j] = q[i, j] · s[⌊i/h⌋, ⌊j/w⌋] for blocks of h × w values. A block is the whole weight, a row, a part
of a row or a tile. q is ``float8_e4m3fn``; s is a tensor beside it.

Sources: compressed-tensors 0.17 (``quantization/lifecycle/forward.py``), and of vLLM 0.32 the quantisations
``fp8`` and ``fbgemm_fp8`` (``model_executor/layers/quantization``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safelora_vllm.errors import CheckpointError

FP8 = "F8_E4M3"  # as safetensors names it
CURE = "Give the unquantised checkpoint"
# Tensors beside a weight that change what it stands for in ways that are not read.
UNREAD = ("weight_zero_point", "weight_g_idx")
_KEYS = ("quantization_config", "compression_config")  # of config.json; the second is an older name

Shape = tuple[int, ...]
Block = tuple[int | None, int | None]  # rows and columns of values with one scale; None: all of them
_TENSOR: Block = (None, None)
_CHANNEL: Block = (1, None)
_LEAST_EXPONENT, _FRACTION_BITS = -6, 3  # of float8_e4m3fn


@dataclass(frozen=True)
class ScaleLayout:
    """How the FP8 weights of a checkpoint are scaled.

    method: as its config names it. blocks: those that its weights may have. suffixes: names of a scale.
    """

    method: str
    blocks: tuple[Block, ...]
    suffixes: tuple[str, ...] = ("weight_scale",)

    def block_of(self, weight: Shape, scale: Shape) -> Block | None:
        """The one of the blocks that gives a weight (d_out, d_in) a scale of this shape; None if not one."""
        fitting = [block for block in self.blocks if scale in _scale_shapes(weight, block)]
        return fitting[0] if len(fitting) == 1 else None

    def expected(self, weight: Shape) -> str:
        """The shapes that a weight's scale may have, in words."""
        return " or ".join(str(_scale_shapes(weight, block)[0]) for block in self.blocks)


def quantisation_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a model's config says about its quantisation; empty where it says nothing."""
    text = config.get("text_config")
    for place in (config, text if isinstance(text, Mapping) else {}):
        for key in _KEYS:
            if isinstance(found := place.get(key), Mapping):
                return found
    return {}


def scale_layout(config: Mapping[str, Any], where: object) -> ScaleLayout:
    """How the FP8 weights of a model are scaled, from its config.

    Args:
        config: the model's ``config.json``.
        where: the model, for messages.

    Raises:
        CheckpointError: the config says nothing, is malformed, or names a quantisation that is not read.
    """
    found = quantisation_of(config)
    if not found:
        raise CheckpointError(
            f"{where} has {FP8} weights, but its config.json has no quantization_config, which says how they "
            f"are scaled. {CURE}"
        )
    try:
        return _layout(found, where)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the quantization_config of {where} is malformed ({error!r:.200}). Download the model again"
        ) from error


def dequantised(weight: Tensor, scale: Tensor, block: Block) -> Tensor:
    """W (d_out, d_in) in float64, where the product is exact: q has 4 and s at most 24 significant bits.

    Blocks at the lower and right edge may be cut off by it.
    """
    return _scaled(weight.to(torch.float64), scale, block)


def rounding(weight: Tensor, scale: Tensor, block: Block) -> float:
    """The ‖·‖² that rounding to FP8 is expected to have added: a twelfth of each value's squared spacing.

    That is about a tenth too much, since fewer values than assumed are rounded by half a spacing.
    """
    _, exponent = torch.frexp(weight.to(torch.float32))  # |q| is from 2^(exponent-1) on
    spacing = torch.exp2((exponent - 1).clamp_min(_LEAST_EXPONENT).to(torch.float64) - _FRACTION_BITS)
    return float(_scaled(spacing, scale, block).square().sum()) / 12.0


def _scaled(result: Tensor, scale: Tensor, block: Block) -> Tensor:
    """Each block times its scale, in place."""
    rows, columns = result.shape
    height, width = block[0] or rows, block[1] or columns
    scales = scale.to(result.device, torch.float64).reshape(-1, math.ceil(columns / width))
    of_rows = scales.repeat_interleave(height, dim=0)[:rows]
    for index in range(of_rows.shape[1]):
        result[:, index * width : (index + 1) * width].mul_(of_rows[:, index : index + 1])
    return result


def _layout(found: Mapping[str, Any], where: object) -> ScaleLayout:
    method = str(found.get("quant_method"))
    if method == "compressed-tensors":
        return ScaleLayout(method, _blocks_of_groups(found, where))
    if method == "fp8":  # DeepSeek's tiles and Mistral's scalars have the second name
        size = found.get("weight_block_size")
        block = _TENSOR if size is None else _tile(size, "weight_block_size", where)
        return ScaleLayout(method, (block,), ("weight_scale", "weight_scale_inv"))
    if method == "fbgemm_fp8":
        return ScaleLayout(method, (_CHANNEL,))
    raise CheckpointError(
        f"{where} is quantised by {method!r:.80}: expected compressed-tensors, fp8 or fbgemm_fp8 for FP8 "
        f"weights. {CURE}"
    )


def _scale_shapes(weight: Shape, block: Block) -> list[Shape]:
    rows, columns = weight
    if block == _TENSOR:
        return [(), (1,), (1, 1)]
    return [(math.ceil(rows / (block[0] or rows)), math.ceil(columns / (block[1] or columns)))]


def only_scaled(config: Mapping[str, Any], where: object) -> None:
    """Refuse a quantization_config of weights that are sparse or stored in another basis.

    Raises:
        CheckpointError: they are.
    """
    for key in ("transform_config", "sparsity_config"):
        other = config.get(key) or {}
        if other.get("config_groups") or other.get("format", "dense") != "dense":
            raise CheckpointError(
                f"{where} has a {key}, so its weights are packed or stored in another basis. {CURE}"
            )


def _blocks_of_groups(config: Mapping[str, Any], where: object) -> tuple[Block, ...]:
    """Of the groups that are 8-bit floats. The shape of a weight's scale tells which group it is in."""
    only_scaled(config, where)
    blocks, others = [], []
    for group in (config.get("config_groups") or {}).values():
        if not (scheme := group.get("weights")):
            continue
        bits, kind = scheme.get("num_bits", 8), str(scheme.get("type", "int")).lower()
        if (bits, kind) == (8, "float") and scheme.get("symmetric", True):
            blocks.append(_block_of(scheme, where))
        else:
            others.append(f"{'' if scheme.get('symmetric', True) else 'asymmetric '}{kind}{bits}")
    if not blocks:
        found = f"weights of {' and '.join(others)}" if others else "no quantised weights"
        raise CheckpointError(
            f"{where} has {found} by its quantization_config: expected symmetric float8. {CURE}"
        )
    return tuple(dict.fromkeys(blocks))


def _block_of(scheme: Mapping[str, Any], where: object) -> Block:
    size = scheme.get("group_size")
    strategy = scheme.get("strategy") or {None: "tensor", -1: "channel"}.get(size, "group")
    if strategy == "tensor":
        return _TENSOR
    if strategy == "channel":
        return _CHANNEL
    if strategy == "block":
        return _tile(scheme.get("block_structure"), "block_structure", where)
    if strategy == "group":
        return _tile([1, size], "group_size", where)
    raise CheckpointError(
        f"{where} scales its weights by {strategy!r:.80}: expected tensor, channel, group or block. {CURE}"
    )


def _tile(size: Any, name: str, where: object) -> Block:
    if isinstance(size, str):  # as older releases of compressed-tensors write it: 128x128
        size = [int(side) for side in size.split("x")]
    sides = size if isinstance(size, list) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise CheckpointError(
            f"{name} of {where} is {size!r:.80}: expected numbers above 0. Download the model again"
        )
    rows, columns = sides
    return rows, columns
