"""FP8 checkpoints: their values, the caches that are built from them, and what is refused."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import safelora_vllm as sl
from safelora_vllm.errors import CheckpointError, ProjectorCacheError
from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.fp8 import dequantised, scale_layout
from tests.tiny import INNER, LLAMA, UP0, Pair, base_weights, module_shapes, write_checkpoint, write_pair

_MAX = 448.0  # the largest float8_e4m3fn
Block = tuple[int | None, int | None]


def _tensors_config(**weights: Any) -> dict[str, Any]:
    """As llm-compressor writes it, with one group."""
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": {"num_bits": 8, "dynamic": True}}
    config = {"config_groups": {"group_0": group}, "format": "float-quantized", "ignore": ["lm_head"]}
    return {"quant_method": "compressed-tensors", "quantization_status": "compressed", **config}


@dataclass(frozen=True)
class Form:
    """A way in which FP8 checkpoints are written."""

    config: dict[str, Any]
    block: Block
    suffix: str = "weight_scale"
    dtype: torch.dtype = torch.float32
    scalar: tuple[int, ...] = (1,)


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
# Neither 96 nor 144 is a multiple of 64 or 40: blocks at the edges are cut off.
FORMS = {
    "tensor": Form(_tensors_config(strategy="tensor"), (None, None)),
    "channel": Form(_tensors_config(strategy="channel"), (1, None), dtype=torch.bfloat16),
    "group": Form(_tensors_config(strategy="group", group_size=16), (1, 16), dtype=torch.bfloat16),
    "block": Form(_tensors_config(strategy="block", block_structure=[64, 40]), (64, 40)),
    "older": Form(_tensors_config(strategy="block", block_structure="64x40"), (64, 40)),
    "channel by size": Form(_tensors_config(group_size=-1), (1, None)),
    "deepseek": Form({**_FP8, "weight_block_size": [64, 40]}, (64, 40), "weight_scale_inv"),
    "static": Form({**_FP8, "activation_scheme": "static"}, (None, None), scalar=()),
    "mistral": Form(
        {**_FP8, "weight_block_size": None}, (None, None), "weight_scale_inv", torch.bfloat16, ()
    ),
    "fbgemm": Form({"quant_method": "fbgemm_fp8", "modules_to_not_convert": []}, (1, None)),
}


def each_block(weight: Tensor, block: Block) -> Any:
    """Where each block begins and ends, and its place in the scale: plain loops."""
    rows, columns = weight.shape
    height, width = block[0] or rows, block[1] or columns
    for i in range(math.ceil(rows / height)):
        for j in range(math.ceil(columns / width)):
            yield (i, j), slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)


def quantised(weight: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """The FP8 weight, its scale, and the float64 values that they stand for."""
    rows, columns = weight.shape
    sides = (math.ceil(rows / (form.block[0] or rows)), math.ceil(columns / (form.block[1] or columns)))
    scale = torch.empty(sides, dtype=form.dtype)
    stored, values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), weight.double()
    for place, row, column in each_block(weight, form.block):
        scale[place] = weight[row, column].abs().max() / _MAX
        stored[row, column] = (weight[row, column] / scale[place].float()).clamp(-_MAX, _MAX).to(stored.dtype)
        values[row, column] = stored[row, column].double() * scale[place].double()
    return stored, scale.reshape(form.scalar) if form.block == (None, None) else scale, values


def fp8_checkpoint(folder: Path, state: dict[str, Tensor], form: Form, shards: int = 1) -> dict[str, Tensor]:
    """Write a checkpoint whose linear layers are FP8. Returns what they stand for."""
    written, values = dict(state), {}
    for module in module_shapes():
        weight, scale, values[module] = quantised(state[f"{module}.weight"], form)
        written |= {f"{module}.weight": weight, f"{module}.{form.suffix}": scale}
        if form.config.get("activation_scheme") == "static":
            written[f"{module}.input_scale"] = torch.ones(())
    write_checkpoint(folder, written, shards, {**LLAMA, "quantization_config": form.config})
    return values


@pytest.fixture
def fp8(tmp_path: Path, pair: Pair) -> Callable[..., Path]:
    """Make the aligned model FP8 in the form of this name, with its tensors and config changed."""

    def make(
        name: str = "channel",
        change: Callable[[dict[str, Tensor]], object] | None = None,
        config: Callable[[dict[str, Any]], object] | None = None,
    ) -> Path:
        form, folder = FORMS[name], tmp_path / f"fp8-{len(list(tmp_path.iterdir()))}"
        written, settings = dict(pair.after), {**LLAMA, "quantization_config": copy.deepcopy(form.config)}
        for module in module_shapes():
            weight, scale, _ = quantised(pair.after[f"{module}.weight"], form)
            written |= {f"{module}.weight": weight, f"{module}.{form.suffix}": scale}
        for call, target in ((change, written), (config, settings)):
            if call:
                call(target)
        return write_checkpoint(folder, written, config=settings)

    return make


@pytest.mark.parametrize("name", FORMS)
def test_each_form_gives_exactly_what_it_stands_for(name: str, pair: Pair, tmp_path: Path) -> None:
    values = fp8_checkpoint(tmp_path / "m", pair.after, FORMS[name], shards=2)
    checkpoint = Checkpoint(tmp_path / "m")
    for module, value in values.items():
        assert torch.equal(checkpoint.weight(module), value), module


@pytest.mark.parametrize("name", ["tensor", "channel", "group", "block"])
def test_compressed_tensors_gives_the_same(name: str) -> None:
    """Its own quantiser and dequantiser. Both round once to the scale's dtype, which has a 2⁻⁹ or 2⁻²⁴."""
    quantisation = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    form = FORMS[name]
    scheme = form.config["config_groups"]["group_0"]["weights"]
    args = quantisation.QuantizationArgs(**scheme)
    weight = torch.randn(144, 96, generator=torch.Generator().manual_seed(3))
    _, scale, _ = quantised(weight, form)
    stored = forward.quantize(weight.to(form.dtype), scale, None, args, dtype=torch.float8_e4m3fn)
    assert stored.dtype == torch.float8_e4m3fn
    theirs = forward.dequantize(stored, scale, args=args)
    layout = scale_layout({"quantization_config": form.config}, "m")
    block = layout.block_of((144, 96), tuple(scale.shape))
    assert block == form.block
    ours = dequantised(stored, scale, block)
    assert (ours - theirs.double()).abs().max() <= ours.abs().max() * torch.finfo(form.dtype).eps / 2


@pytest.mark.parametrize("side", ["base", "aligned", "both"])
def test_a_cache_of_fp8_models_is_that_of_their_values(
    side: str, pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folders, plain = {}, {}
    for name, state in (("base", pair.before), ("aligned", pair.after)):
        folders[name] = plain[name] = getattr(pair, name)
        if side in (name, "both"):
            folders[name] = tmp_path / name
            values = fp8_checkpoint(folders[name], state, FORMS["deepseek"])
            double = {**state, **{f"{module}.weight": value for module, value in values.items()}}
            plain[name] = write_checkpoint(tmp_path / f"plain-{name}", double)
    caches = {}
    for kind, (base, aligned) in {"fp8": folders.values(), "plain": plain.values()}.items():
        caches[kind] = sl.ProjectorCache(
            build(base, aligned, tmp_path / kind, BuildOptions(exact=True, form="factored"))
        )
    found, expected = caches["fp8"], caches["plain"]
    assert found.modules == expected.modules and set(found.modules) == set(module_shapes())
    for name in found.modules:
        assert torch.equal(found.projector(name).energies, expected.projector(name).energies)
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING and "FP8" in r.getMessage())
    assert record.getMessage().count(str(tmp_path)) == (2 if side == "both" else 1)


def test_the_served_fp8_model_is_told_from_others(
    fp8: Callable[..., Path], pair: Pair, tmp_path: Path
) -> None:
    served = fp8("deepseek")
    cache = sl.build_projectors(pair.base, served, tmp_path / "cache")
    cache.check_model(Checkpoint(served).fingerprint(), served)
    name = f"{UP0}.weight_scale_inv"
    others = {
        "unquantised": pair.aligned,
        "scale": fp8("deepseek", lambda state: state[name].mul_(1.01)),
        "blocks": fp8(
            "deepseek", config=lambda c: c["quantization_config"].update(weight_block_size=[63, 39])
        ),
    }
    # 63 × 39 gives every scale the same shape as 64 × 40 does.
    assert Checkpoint(others["blocks"]).weight(UP0).shape == (INNER, 96)
    for other in others.values():
        assert Checkpoint(other).digest() != Checkpoint(served).digest()
        with pytest.raises(ProjectorCacheError, match="is not the aligned model"):
            cache.check_model(Checkpoint(other).fingerprint(), other)
    # What says nothing about the weights changes nothing.
    same = fp8("deepseek", config=lambda c: c["quantization_config"].update(ignored_layers=["x"]))
    assert Checkpoint(same).fingerprint() == Checkpoint(served).fingerprint()


@pytest.mark.parametrize("name", ["tensor", "channel", "deepseek"])
def test_the_expected_rounding_is_what_rounding_does(name: str, tmp_path: Path) -> None:
    """A tenth more, as it says; and of each row of 96 values the largest is exact."""
    state = base_weights()
    values = fp8_checkpoint(tmp_path / "m", state, FORMS[name])
    checkpoint = Checkpoint(tmp_path / "m")
    for module, value in values.items():
        found = float((state[f"{module}.weight"].double() - value).square().sum())
        assert 0.95 <= checkpoint.rounding(module) / found <= 1.25, module
    assert Checkpoint(write_checkpoint(tmp_path / "plain", state)).rounding(UP0) == 0.0


@pytest.mark.parametrize("side", ["base", "aligned"])
def test_a_v_that_is_mostly_rounding_is_refused(side: str, tmp_path: Path) -> None:
    """An alignment that changes weights by less than rounding does, as LoRA trainings do."""
    small = write_pair(tmp_path / "pair", step=0.0005)
    folders = {"base": small.base, "aligned": small.aligned}
    for name, state in (("base", small.before), ("aligned", small.after)):
        fp8_checkpoint(tmp_path / name, state, FORMS["channel"])
    one = {**folders, side: tmp_path / side}
    with pytest.raises(CheckpointError, match=r"about \d+% of ‖V‖² is the FP8 rounding of .*unquantised"):
        build(one["base"], one["aligned"], tmp_path / "cache")
    assert not list(tmp_path.glob("*cache*"))
    assert build(tmp_path / "base", tmp_path / "aligned", tmp_path / "cache").is_dir()


def test_a_plan_needs_only_headers(fp8: Callable[..., Path], pair: Pair) -> None:
    def shapes(plan: sl.Plan) -> set[Any]:
        return {group.shape for group in plan.groups}

    plan = sl.plan_projectors(fp8("block"))
    assert plan.modules == len(module_shapes()) and shapes(plan) == shapes(sl.plan_projectors(pair.aligned))


_WEIGHT, _SCALE = f"{UP0}.weight", f"{UP0}.weight_scale"


def _with(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({name: tensor})


def _cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({name: state[name].to(dtype)})


def _quantization(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config["quantization_config"].update(changes)


def _scheme(**changes: Any) -> Callable[[dict[str, Any]], object]:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["weights"].update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "config", "told"),
    [
        (lambda s: s.pop(_SCALE), None, rf"{_WEIGHT} in .* is F8_E4M3 with no scale: expected {_SCALE}"),
        (_with(_SCALE, torch.ones(96, 1)), None, r"F32 \(96, 1\): .*\(144, 96\) has floats \(144, 1\)"),
        (_cast(_SCALE, torch.uint8), None, rf"{_SCALE} in .* is U8; expected one of"),
        (_cast(_SCALE, torch.float8_e4m3fn), None, r"is F8_E4M3 \(144, 1\)"),
        (_with(f"{UP0}.weight_zero_point", torch.ones(144, 1)), None, "has a weight_zero_point"),
        (_with(f"{UP0}.weight_g_idx", torch.ones(96)), None, "has a weight_g_idx"),
        (_cast(_WEIGHT, torch.float8_e5m2), None, "is F8_E5M2; .* by 'compressed-tensors'"),
        (_cast(_WEIGHT, torch.int8), None, "is I8; expected one of .* unquantised"),
        (None, lambda c: c.pop("quantization_config"), "has no quantization_config"),
        (None, _quantization(quant_method="modelopt"), "by 'modelopt': expected compressed-tensors"),
        (None, _quantization(config_groups=[]), "no quantised weights"),
        (None, _quantization(config_groups=[1]), "quantization_config of .* is malformed"),
        (None, _quantization(config_groups={"a": 1}), "quantization_config of .* is malformed"),
        (None, _quantization(transform_config={"config_groups": {"R1": {}}}), "has a transform_config"),
        (None, _quantization(sparsity_config={"format": "sparse-24-bitmask"}), "has a sparsity_config"),
        (None, _scheme(num_bits=4), "weights of float4"),
        (None, _scheme(type="int", symmetric=False), "weights of asymmetric int8"),
        (None, _scheme(strategy="tensor_group"), "'tensor_group': expected tensor, channel, group or block"),
        (None, _scheme(strategy="block", block_structure=[128]), r"block_structure of .* is \[128\]"),
        (None, _scheme(strategy="block", block_structure="axb"), "quantization_config of .* is malformed"),
        (None, _scheme(strategy="group", group_size=0), r"group_size of .* is \[1, 0\]"),
        (None, _scheme(strategy="tensor"), r"BF16 \(96, 1\): .* has floats \(\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_before_the_work(
    change: Any, config: Any, told: str, fp8: Callable[..., Path], pair: Pair, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=told) as refused:
        sl.build_projectors(pair.base, fp8("channel", change, config), tmp_path / "cache")
    cures = ("give the unquantised checkpoint", "download the model again")
    assert any(cure in str(refused.value).lower() for cure in cures)
    assert not (tmp_path / "cache").exists()


def test_two_scales_of_one_weight(fp8: Callable[..., Path], pair: Pair, tmp_path: Path) -> None:
    folder = fp8("static", lambda s: s.update({f"{UP0}.weight_scale_inv": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=f"two scales, {_SCALE} and {_SCALE}_inv"):
        sl.build_projectors(pair.base, folder, tmp_path / "cache")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_scale_that_is_not_finite(
    value: float, fp8: Callable[..., Path], pair: Pair, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"{_SCALE} in .* has NaN or infinite values"):
        sl.build_projectors(
            pair.base, fp8("channel", lambda s: s[_SCALE][3].fill_(value)), tmp_path / "cache"
        )
    assert not (tmp_path / "cache").exists()


def test_an_fp8_weight_that_is_nan(fp8: Callable[..., Path], pair: Pair, tmp_path: Path) -> None:
    nan = torch.full((144, 96), math.nan).to(torch.float8_e4m3fn)
    folder = fp8("channel", lambda s: s.update({_WEIGHT: nan}))
    with pytest.raises(CheckpointError, match=f"{_WEIGHT} has NaN or infinite values"):
        sl.build_projectors(pair.base, folder, tmp_path / "cache")


def test_several_groups_and_plain_layers(fp8: Callable[..., Path], pair: Pair) -> None:
    """A 4-bit group beside the FP8 one, tiles that fit the same scale, and a layer that is left as it was."""
    second = {"targets": ["re:.*down_proj"], "weights": {"num_bits": 4, "type": "float"}}

    def mixed(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_1"] = second

    folder = fp8("channel", lambda s: s.update({_WEIGHT: pair.after[_WEIGHT]}), mixed)
    assert torch.equal(Checkpoint(folder).weight(UP0), pair.w(UP0))
    tiles = [{"weights": {"type": "float", "strategy": "block", "block_structure": [n, n]}} for n in (63, 64)]
    settings = {"quant_method": "compressed-tensors", "config_groups": dict(enumerate(tiles))}
    layout = scale_layout({"text_config": {"compression_config": settings}}, "m")
    assert layout.blocks == ((63, 63), (64, 64))
    assert layout.block_of((100, 100), (2, 2)) is None  # either of them
    assert layout.block_of((127, 63), (3, 1)) == (63, 63)


@pytest.mark.parametrize(("suffix", "method"), [("qweight", "gptq"), ("weight_packed", "compressed-tensors")])
def test_packed_integers_are_named(suffix: str, method: str, pair: Pair, tmp_path: Path) -> None:
    state = dict(pair.after)
    state[f"{UP0}.{suffix}"] = torch.zeros(12, 144, dtype=torch.int32)
    del state[_WEIGHT]
    config = {**LLAMA, "quantization_config": {"quant_method": method}}
    folder = write_checkpoint(tmp_path / "packed", state, config=config)
    for call in (
        lambda: sl.build_projectors(pair.base, folder, tmp_path / "cache"),
        lambda: sl.build_projectors(folder, pair.aligned, tmp_path / "cache", modules=["up_proj"]),
        lambda: sl.plan_projectors(folder),
    ):
        with pytest.raises(
            CheckpointError, match=rf"{UP0} in .*packed is packed .* by '{method}'.* unquantised"
        ):
            call()
    assert sl.plan_projectors(folder, modules=["q_proj"]).modules == 2


def test_bytes_in_another_shape_are_called_quantised(pair: Pair, tmp_path: Path) -> None:
    """As bitsandbytes packs four bits."""
    state = {**pair.after, _WEIGHT: torch.zeros(144 * 48, 1, dtype=torch.uint8)}
    config = {**LLAMA, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    folder = write_checkpoint(tmp_path / "m", state, config=config)
    with pytest.raises(CheckpointError, match=r"is U8; expected one of .* by 'bitsandbytes'\. Give"):
        sl.build_projectors(pair.base, folder, tmp_path / "cache")
