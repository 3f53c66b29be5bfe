"""Checkpoints whose files are explained by rounding, and whose served weights are other ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelora_vllm.errors import CheckpointError, ProjectorCacheError
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.served_model import check_served_model
from safelora_vllm.served_model.scales import limit
from safelora_vllm.served_model.stored import Stored
from tests import quantised
from tests.test_quantised import FORMS, GROUP, UP0, copy, made
from tests.tiny import Pair, write_checkpoint

__all__ = ["copy", "made"]  # fixtures
Made = tuple[ProjectorCache, Pair]
REFUSED = (ProjectorCacheError, CheckpointError)


def strongest(weight: Tensor, share: float) -> Tensor:
    return weight.float().norm(dim=1).topk(max(1, int(share * len(weight)))).indices


def int8_rows(share: float) -> Callable[[Tensor], quantised.Parts]:
    """Rows of zeros, with a scale whose half step is larger than any weight."""

    def quantise(weight: Tensor) -> quantised.Parts:
        parts, rows = quantised.eight_bits(weight), strongest(weight, share)
        parts["weight"][rows], parts["SCB"][rows] = 0, 1e4
        return parts

    return quantise


def fp8_rows(weight: Tensor) -> quantised.Parts:
    parts, rows = quantised.fp8(weight), strongest(weight, 0.06)
    parts["weight"].view(torch.uint8)[rows] = 0
    parts["weight_scale"][rows] = 1e4
    return parts


def compressed_rows(weight: Tensor) -> quantised.Parts:
    parts, rows = quantised.int8(weight), strongest(weight, 0.06)
    parts["weight"][rows], parts["weight_scale"][rows] = 0, 1e4
    return parts


def nf4_blocks(every: int) -> Callable[[Tensor], quantised.Parts]:
    """Blocks of zeros (code 7) with a large absmax."""

    def quantise(weight: Tensor) -> quantised.Parts:
        parts = quantised.four_bits(weight, "nf4", nested=False)
        largest, data = parts["weight.absmax"], parts["weight"].view(-1)
        size = weight.numel() // len(largest) // 2
        for block in range(0, len(largest), every):
            data[block * size : (block + 1) * size] = 0x77
            largest[block] = 1e4
        return parts

    return quantise


def clipped(share: float) -> Callable[[Tensor], quantised.Parts]:
    """Groups with tiny scales: every weight is clipped to nearly 0."""

    def quantise(weight: Tensor) -> quantised.Parts:
        _, scale, zero = quantised.round_groups(weight, 4, GROUP, True)
        chosen = torch.zeros(scale.numel(), dtype=torch.bool)
        order = torch.randperm(scale.numel(), generator=torch.Generator().manual_seed(2))
        chosen[order[: int(share * scale.numel())]] = True
        scale = torch.where(chosen.reshape(scale.shape), torch.full_like(scale, 6e-8), scale)
        return quantised.gptq(coded(weight, scale, zero), scale, zero, 4)

    return quantise


def coded(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    parts = weight.float().reshape(*scale.shape, GROUP)
    codes = (parts / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    return codes.to(torch.int64).reshape(weight.shape)


def other_zeros(weight: Tensor) -> quantised.Parts:
    """Right with the zero points of the file; a symmetric kernel has 8."""
    _, scale, _ = quantised.round_groups(weight, 4, GROUP, True)
    scale = scale * 2
    zero = torch.randint(4, 13, scale.shape, generator=torch.Generator().manual_seed(4))
    return quantised.gptq(coded(weight, scale, zero), scale, zero, 4)


def other_order(weight: Tensor) -> quantised.Parts:
    """Right with the file's g_idx, which vLLM drops."""
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
    codes, scale, zero = quantised.round_groups(weight[:, order], 4, GROUP, True)
    back = order.argsort()
    return quantised.gptq(codes[:, back], scale, zero, 4, (torch.arange(len(order)) // GROUP)[back])


def symmetric_with_zeros(weight: Tensor) -> quantised.Parts:
    """compressed-tensors whose config says symmetric: vLLM does not load zero points then."""
    codes, scale, zero = quantised.round_groups(weight, 4, GROUP, False, torch.bfloat16)
    return quantised.packed_tensors(codes, scale, zero, 4)


def ordered(weight: Tensor) -> quantised.Parts:
    parts = FORMS["compressed-tensors, 4 bits"][1](weight)
    return {**parts, "weight_g_idx": (torch.arange(weight.shape[1]) % 2).to(torch.int32)}


def int8_zeros(weight: Tensor) -> quantised.Parts:
    return {**quantised.int8(weight), "weight_zero_point": torch.ones(len(weight), 1, dtype=torch.int8)}


def other_table(weight: Tensor) -> quantised.Parts:
    """bitsandbytes has NF4's table in its code and ignores the file's."""
    parts = quantised.four_bits(weight, "nf4")
    parts["weight.quant_map"] = parts["weight.quant_map"] * 0.9
    return parts


ATTACKS: dict[str, tuple[str, Callable[[Tensor], quantised.Parts], str]] = {
    "int8, all rows": ("bitsandbytes, int8", int8_rows(1.0), "scales of .* are larger"),
    "int8, a quarter of the rows": ("bitsandbytes, int8", int8_rows(0.25), "scales of .* are larger"),
    "int8, 6 % of the rows": ("bitsandbytes, int8", int8_rows(0.06), "scales of .* are larger"),
    "NF4, all blocks": ("bitsandbytes, NF4, not nested", nf4_blocks(1), "scales of .* are larger"),
    "NF4, 1 block in 16": ("bitsandbytes, NF4, not nested", nf4_blocks(16), "scales of .* are larger"),
    "FP8, rows": ("compressed-tensors, FP8", fp8_rows, "scales of .* are larger"),
    "compressed-tensors int8, rows": (
        "compressed-tensors, int8", compressed_rows, "scales of .* are larger"
    ),
    "GPTQ, all clipped": ("GPTQ, 4 bits", clipped(1.0), "scales of .* are smaller"),
    "GPTQ, 5 % clipped": ("GPTQ, 4 bits", clipped(0.05), "scales of .* are smaller"),
    "GPTQ, 2 % clipped": ("GPTQ, 4 bits", clipped(0.02), "scales of .* are smaller"),
    "GPTQ, zero points": ("GPTQ, 4 bits", other_zeros, "zero points other than 8.*cannot be compared"),
    "GPTQ, g_idx": ("GPTQ, 4 bits", other_order, "another order.*cannot be compared"),
    "symmetric with zero points": (
        "compressed-tensors, 4 bits", symmetric_with_zeros, "symmetric by its config.*cannot be compared"
    ),
    "weight_g_idx": ("compressed-tensors, 4 bits", ordered, "another order.*cannot be compared"),
    "int8 with zero points": ("compressed-tensors, int8", int8_zeros, "int8 with zero points"),
    "another table": ("bitsandbytes, NF4", other_table, "another quant_map"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_only_the_file_explains(attack: str, copy: Callable[..., Path], made: Made) -> None:
    form, quantise, match = ATTACKS[attack]
    folder = copy(form, quantise=quantise)
    with pytest.raises(REFUSED, match=match):  # one layer only: V of a tiny pair is large, and is seen first
        check_served_model(made[0], folder, quick=True)
    with pytest.raises(REFUSED):
        check_served_model(made[0], folder)


def one_scale(weight: Tensor) -> quantised.Parts:
    scale = weight.float().abs().amax() / 127.5
    return {"weight": (weight / scale).round().clamp(-128, 127).to(torch.int8), "weight_scale": scale[None]}


def tiles(weight: Tensor) -> quantised.Parts:
    """DeepSeek's FP8, in tiles of 16 × 16, with scales that are powers of two."""
    rows, width = weight.shape
    parts = weight.float().reshape(rows // 16, 16, width // 16, 16)
    scale = torch.exp2((parts.abs().amax((1, 3)) / 448).log2().ceil())
    codes = (parts / scale[:, None, :, None]).reshape(rows, width).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scale}


def without_order(weight: Tensor) -> quantised.Parts:
    parts = FORMS["GPTQ, 4 bits"][1](weight)
    return {name: part for name, part in parts.items() if name != "g_idx"}


def packed_8(weight: Tensor) -> quantised.Parts:
    codes, scale, _ = quantised.round_groups(weight, 8, GROUP, True, torch.bfloat16)
    return quantised.packed_tensors(codes, scale, None, 8)


HONEST: dict[str, tuple[dict[str, Any], Callable[[Tensor], quantised.Parts]]] = {
    "GPTQ, one group": (
        {**quantised.GPTQ, "bits": 8, "group_size": -1, "desc_act": True},
        lambda w: quantised.gptq(*quantised.round_groups(w, 8, w.shape[1], True), bits=8),
    ),
    "auto-round": (
        {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "sym": True}, without_order
    ),
    "AWQ, other keys": (
        {"quant_method": "awq", "w_bit": 4, "q_group_size": GROUP, "zero_point": True},
        FORMS["AWQ, 4 bits"][1],
    ),
    "int8, one scale": (quantised.scheme(8, strategy="tensor"), one_scale),
    "FP8, tiles": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, tiles),
    "packed, 8 bits": (
        {**quantised.scheme(4, strategy="group", group_size=GROUP), "config_groups": {"group_0": {
            "weights": {"num_bits": 8, "strategy": "group", "group_size": GROUP}}}},
        packed_8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", HONEST)
def test_honest_copies_of_other_sizes(form: str, copy: Callable[..., Path], made: Made) -> None:
    config, quantise = HONEST[form]
    if form.startswith("packed"):
        pytest.importorskip("compressed_tensors")
    found = check_served_model(made[0], copy(config=config, quantise=quantise))
    assert found is not None and found.rounded and abs(found.position) < 0.1


@pytest.mark.parametrize(
    ("near", "expected"), [(0, [1, 5, 2, 1]), (1, [5, 5, 5, 2]), (3, [5, 5, 5, 5]), (99, [5, 5, 5, 5])]
)
def test_rows_that_share_a_scale(near: int, expected: list[int]) -> None:
    zeros = torch.zeros(4, 8)
    stored = Stored("x", zeros, zeros, zeros, zeros, calibrated=True, near=near)
    assert limit(torch.tensor([1.0, 5, 2, 1]), stored).flatten().tolist() == [2 * part for part in expected]


LONG = {f"{UP0}.weight.quant_state.bitsandbytes__nf4": b'{"blocksize": 64}' + b" " * 5000}
DEEP = {f"{UP0}.weight.quant_state.bitsandbytes__nf4": b"[" * 4000}


@pytest.mark.parametrize("state", [LONG, DEEP], ids=["long", "deep"])
def test_a_quant_state_is_short_and_flat(
    state: dict[str, bytes],
    copy: Callable[..., Path],
    made: Made,
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: torch.tensor(list(data), dtype=torch.uint8) for name, data in state.items()}

    with pytest.raises(CheckpointError, match="damaged quant_state"):
        check_served_model(made[0], copy("bitsandbytes, NF4", change=change))


@pytest.mark.parametrize(
    ("form", "changes", "match"),
    [
        ("bitsandbytes, NF4", {"load_in_4bit": False, "load_in_8bit": True}, "does not say load_in_4bit"),
        ("bitsandbytes, int8", {"load_in_8bit": None}, "does not say load_in_8bit"),
        ("compressed-tensors, 4 bits", {"config_groups": {}}, "in one of 0 ways"),
        (
            "compressed-tensors, 4 bits",
            {"transform_config": {"config_groups": {"a": {}}}},
            "rotated or sparse",
        ),
    ],
)
def test_what_the_config_says_is_what_is_loaded(
    form: str,
    changes: dict[str, Any],
    match: str,
    copy: Callable[..., Path],
    made: Made,
) -> None:
    with pytest.raises(CheckpointError, match=match):
        check_served_model(made[0], copy(form, config={**FORMS[form][0], **changes}))


@pytest.mark.parametrize("name", ["zz.safetensors", "consolidated.safetensors"])
def test_a_file_that_vllm_loads_too(name: str, made: Made, tmp_path: Path) -> None:
    """Without an index vLLM loads all files; consolidated ones come before all others."""
    folder = write_checkpoint(tmp_path / "served", made[1].after)
    assert check_served_model(made[0], folder) is None
    save_file(made[1].before, folder / name)
    with pytest.raises(CheckpointError, match=f"has {name} besides"):
        check_served_model(made[0], folder)
    tensors = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if name.startswith("zz"):
        assert check_served_model(made[0], folder) is None
        return
    with pytest.raises(CheckpointError, match=f"has {name} besides"):
        check_served_model(made[0], folder)
