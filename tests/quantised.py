"""Quantised checkpoints, written after the documented layouts or by the libraries themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Parts = dict[str, Tensor]  # suffix of a module's tensor → tensor
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: nibble i of a word has this column of eight


def round_groups(
    weight: Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype = torch.float16
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (d_out, d_in), scales and zero points (d_out, groups), rounded to the nearest."""
    d_out, d_in = weight.shape
    parts = weight.float().reshape(d_out, d_in // group, group)
    top = 2**bits - 1
    if symmetric:
        scale = parts.abs().amax(-1) / (2 ** (bits - 1) - 0.5)
        scale = scale.to(dtype).float().clamp_min(1e-7)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = parts.amin(-1).clamp_max(0), parts.amax(-1).clamp_min(0)
        scale = ((high - low) / top).to(dtype).float().clamp_min(1e-7)
        zero = (-low / scale).round().clamp(0, top)
    codes = (parts / scale[..., None] + zero[..., None]).round().clamp(0, top)
    return codes.reshape(d_out, d_in).to(torch.int64), scale, zero.to(torch.int64)


def words(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 words along the last side, lowest bits first, or in another order of the columns."""
    per = 32 // bits
    parts = codes.reshape(*codes.shape[:-1], -1, per)
    total = torch.zeros(parts.shape[:-1], dtype=torch.int64)
    for place, column in enumerate(order or range(per)):
        total |= parts[..., column] << (bits * place)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def gptq(
    codes: Tensor, scale: Tensor, zero: Tensor, bits: int, order: Tensor | None = None, first: bool = True
) -> Parts:
    """AutoGPTQ's layout: W = (q − z)·s, packed along d_in. first: the version that stores z − 1."""
    groups = scale.shape[1]
    index = torch.arange(codes.shape[1]) // (codes.shape[1] // groups) if order is None else order
    stored = (zero - 1 if first else zero) & (2**bits - 1)
    return {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words(stored.T.contiguous(), bits),
        "scales": scale.T.contiguous().half(),
        "g_idx": index.to(torch.int32),
    }


def awq(codes: Tensor, scale: Tensor, zero: Tensor) -> Parts:
    """AutoAWQ's GEMM layout, packed along d_out."""
    return {
        "qweight": words(codes.T.contiguous(), 4, AWQ_ORDER),
        "qzeros": words(zero.T.contiguous(), 4, AWQ_ORDER),
        "scales": scale.T.contiguous().half(),
    }


def four_bits(weight: Tensor, kind: str, nested: bool = True) -> Parts:
    """By bitsandbytes itself, as transformers writes them."""
    import bitsandbytes.functional as bnb

    data, state = bnb.quantize_4bit(weight.float(), quant_type=kind, compress_statistics=nested)
    return {"weight": data} | {
        f"weight.{key.removeprefix('weight.')}": value for key, value in state.as_dict(packed=True).items()
    }


def eight_bits(weight: Tensor) -> Parts:
    """bitsandbytes' 8-bit integers."""
    largest = weight.float().abs().amax(1)
    codes = (weight.float() * 127 / largest[:, None]).round().to(torch.int8)
    return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def int8(weight: Tensor) -> Parts:
    """compressed-tensors' int-quantized, a scale for each row."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127.5).to(torch.bfloat16)
    codes = (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}


def packed_tensors(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Parts:
    """compressed-tensors' pack-quantized, packed by its own code. codes, zero: unsigned."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    offset = 2 ** (bits - 1)
    parts = {
        "weight_packed": pack_to_int32((codes - offset).to(torch.int8), bits),
        "weight_scale": scale.to(torch.bfloat16),
        "weight_shape": torch.tensor(codes.shape),
    }
    if zero is not None:
        parts["weight_zero_point"] = pack_to_int32(
            (zero - offset).to(torch.int8), bits, packed_dim=0
        ).contiguous()
    return parts


def fp8(weight: Tensor) -> Parts:
    """compressed-tensors' float-quantized, a scale for each row."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    return {
        "weight": (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn),
        "weight_scale": scale,
    }


def scheme(
    bits: int, kind: str = "int", strategy: str = "channel", symmetric: bool = True, **more: Any
) -> dict[str, Any]:
    """A compressed-tensors config with one group."""
    weights = {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "symmetric": symmetric,
        "dynamic": False,
        **more,
    }
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if bits == 8:
        inputs = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
        group["input_activations"] = inputs
    form = {8: "int-quantized" if kind == "int" else "float-quantized"}.get(bits, "pack-quantized")
    return {
        "quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    }  # fmt: skip


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}


def grouped(
    layout: Callable[..., Parts], group: int, bits: int = 4, symmetric: bool = False, **more: Any
) -> Any:
    """A quantiser of weights in groups, in one of the layouts above."""

    def quantise(weight: Tensor) -> Parts:
        return layout(*round_groups(weight, bits, group, symmetric), **more)

    return quantise


def forms(group: int) -> dict[str, tuple[dict[str, Any], Callable[[Tensor], Parts]]]:
    """Name → quantization_config and the quantiser of one weight; rounding to the nearest."""
    bnb = {"quant_method": "bitsandbytes", "load_in_4bit": True}

    def tensors(symmetric: bool) -> Callable[[Tensor], Parts]:
        def quantise(weight: Tensor) -> Parts:
            codes, scale, zero = round_groups(weight, 4, group, symmetric, torch.bfloat16)
            return packed_tensors(codes, scale, None if symmetric else zero, 4)

        return quantise

    four = {"strategy": "group", "group_size": group}
    return {
        "GPTQ, 4 bits": (
            {**GPTQ, "group_size": group},
            grouped(lambda c, s, z: gptq(c, s, z, 4), group, symmetric=True),
        ),
        "AWQ, 4 bits": ({**AWQ, "group_size": group}, grouped(awq, group)),
        "compressed-tensors, 4 bits": (scheme(4, **four), tensors(True)),
        "compressed-tensors, 4 bits, zero points": (scheme(4, symmetric=False, **four), tensors(False)),
        "compressed-tensors, int8": (scheme(8), int8),
        "compressed-tensors, FP8": (scheme(8, "float"), fp8),
        "bitsandbytes, NF4": (bnb, lambda weight: four_bits(weight, "nf4")),
        "bitsandbytes, NF4, not nested": (bnb, lambda weight: four_bits(weight, "nf4", nested=False)),
        "bitsandbytes, FP4": (bnb, lambda weight: four_bits(weight, "fp4")),
        "bitsandbytes, int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, eight_bits),
    }


def write(
    folder: Path,
    state: Mapping[str, Tensor],
    modules: list[str],
    config: dict[str, Any],
    found: dict[str, Any],
    quantise: Callable[[Tensor], Parts],
) -> Path:
    """A checkpoint whose modules are quantised. config: of the model. found: its quantization_config."""
    folder.mkdir(parents=True)
    written = dict(state)
    for module in modules:
        weight = written.pop(f"{module}.weight")
        written |= {f"{module}.{suffix}": tensor for suffix, tensor in quantise(weight).items()}
    save_file({name: tensor.contiguous() for name, tensor in written.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": found}))
    return folder
