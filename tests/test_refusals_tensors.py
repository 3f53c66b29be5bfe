"""Refusals by the tensors: names, dtypes, shapes, values, size."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from safelora_vllm.adapters.read import Limits
from safelora_vllm.gate import GateSettings
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import PublishedStore
from tests.refusing import Case, Spoil, codes, config, judge, table
from tests.tiny import K0, Q0, UP0, Draft, key, lora, lora_config

_A, _B = key(Q0, "A"), key(Q0, "B")


def move(new: str) -> Spoil:
    """Both tensors of q_proj under another module's name."""
    return lambda draft: draft.move(Q0, new)


def add(name: str, shape: tuple[int, ...] = (96,)) -> Spoil:
    """One more tensor."""
    return lambda draft: draft.tensors.update({name: torch.zeros(shape)})


def rename(template: str) -> Spoil:
    """Both names of q_proj in another spelling; ``{}`` stands for A and B."""

    def spoil(draft: Draft) -> None:
        for side in "AB":
            draft.rename(key(Q0, side), template.format(side))

    return spoil


def drop(name: str) -> Spoil:
    """Leave a tensor out."""
    return lambda draft: draft.tensors.pop(name)


def set_(name: str, tensor: Tensor) -> Spoil:
    """Another tensor under the name."""
    return lambda draft: draft.change(name, tensor)


def value(name: str, number: float, dtype: torch.dtype = torch.float32) -> Spoil:
    """One value of a tensor, all of it in the dtype."""

    def spoil(draft: Draft) -> None:
        tensor = draft.tensors[name].to(dtype)
        tensor[0, 0] = number
        draft.change(name, tensor)

    return spoil


def cast(dtype: torch.dtype) -> Spoil:
    """Both tensors of q_proj in another dtype."""
    return lambda draft: [draft.change(name, draft.tensors[name].to(dtype)) for name in (_A, _B)]


def rank(count: int, declared: int | None = None) -> Spoil:
    """q_proj with another rank."""

    def spoil(draft: Draft) -> None:
        draft.change(_A, torch.zeros(count, 96))
        draft.change(_B, torch.zeros(96, count))
        if declared is not None:
            draft.config["rank_pattern"] = {"layers.0.self_attn.q_proj": declared}

    return spoil


_LONG = "base_model.model." + "a" * 600 + ".lora_{}.weight"
TENSORS: list[Case] = [
    ("embeddings", "no_projector", move("model.embed_tokens")),
    ("lm-head", "no_projector", move("lm_head")),
    ("norm", "no_projector", move("model.layers.0.input_layernorm")),
    ("final-norm", "no_projector", move("model.norm")),
    ("expert", "no_projector", move("model.layers.0.mlp.experts.0.up_proj")),
    ("stacked-experts", "no_projector", move("model.layers.0.mlp.experts")),
    ("router", "no_projector", move("model.layers.0.mlp.gate")),
    ("vision-tower", "no_projector", move("vision_tower.layers.0.self_attn.q_proj")),
    ("layer-9999", "no_projector", move("model.layers.9999.self_attn.q_proj")),
    ("layer-00", "no_projector", move("model.layers.00.self_attn.q_proj")),
    ("fused", "no_projector", move("model.layers.0.self_attn.qkv_proj")),
    ("suffix-only", "no_projector", move("q_proj")),
    ("upper-case", "no_projector", move(Q0.upper())),
    ("double-dot", "no_projector", move(Q0.replace(".", "..", 1))),
    ("dot-before", "no_projector", move("." + Q0)),
    ("dot-behind", "no_projector", move(Q0 + ".")),
    ("prefix-twice", "no_projector", move("base_model.model." + Q0)),
    ("no-prefix", "unknown_tensor", rename(Q0 + ".lora_{}.weight")),
    ("half-prefix", "no_projector", rename(f"base_model.{Q0}.lora_{{}}.weight")),
    ("other-prefix", "unknown_tensor", rename(f"base_model_model.{Q0}.lora_{{}}.weight")),
    ("adapter-name", "unknown_tensor", rename(f"base_model.model.{Q0}.lora_{{}}.default.weight")),
    ("no-weight", "unknown_tensor", rename(f"base_model.model.{Q0}.lora_{{}}")),
    ("space", "unknown_tensor", rename(f"base_model.model.{Q0} .lora_{{}}.weight")),
    ("newline", "unknown_tensor", rename(f"base_model.model.{Q0}.lora_{{}}.weight\n")),
    ("escape", "unknown_tensor", rename(f"base_model.model.{Q0}\x1b[31m.lora_{{}}.weight")),
    ("unicode-digit", "unknown_tensor", rename("base_model.model.layers.٠.q_proj.lora_{}.weight")),
    ("long-name", "unknown_tensor", rename(_LONG)),
    ("empty-name", "unknown_tensor", add("")),
    ("lora-C", "unknown_tensor", add(f"base_model.model.{Q0}.lora_C.weight")),
    ("alias-beside", "unknown_tensor", add(f"base_model.model.{Q0}.lora_A.default.weight", (4, 96))),
    ("whole-weight", "unknown_tensor", add(f"base_model.model.{Q0}.weight", (96, 96))),
    ("base-layer", "unknown_tensor", add(f"base_model.model.{Q0}.base_layer.weight", (96, 96))),
    ("magnitude", "dora", add(f"base_model.model.{Q0}.lora_magnitude_vector")),
    ("magnitude-weight", "dora", add(f"base_model.model.{Q0}.lora_magnitude_vector.weight")),
    ("embedding-A", "embedding", add("base_model.model.model.embed_tokens.lora_embedding_A", (4, 64))),
    ("saved-head", "modules_to_save", add("base_model.model.lm_head.modules_to_save.weight", (64, 96))),
    ("tokens", "trainable_tokens", add("base_model.model.embed_tokens.trainable_tokens_delta", (1, 96))),
    ("bias", "bias", add(f"base_model.model.{Q0}.bias")),
    ("lora-bias", "bias", add(f"base_model.model.{Q0}.lora_B.bias")),
    ("only-A", "unpaired", drop(_B)),
    ("only-B", "unpaired", drop(_A)),
    ("fp64", "dtype", cast(torch.float64)),
    ("int8", "dtype", cast(torch.int8)),
    ("int64", "dtype", cast(torch.int64)),
    ("bool", "dtype", cast(torch.bool)),
    ("fp8", "dtype", cast(torch.float8_e4m3fn)),
    ("complex", "dtype", cast(torch.complex64)),
    ("A-1-D", "shape", set_(_A, torch.zeros(96))),
    ("B-1-D", "shape", set_(_B, torch.zeros(96))),
    ("A-3-D", "shape", set_(_A, torch.zeros(1, 4, 96))),
    ("B-3-D", "shape", set_(_B, torch.zeros(96, 4, 1))),
    ("A-0-D", "shape", set_(_A, torch.zeros(()))),
    ("A-too-wide", "shape", set_(_A, torch.zeros(4, 97))),
    ("A-too-narrow", "shape", set_(_A, torch.zeros(4, 32))),
    ("B-too-tall", "shape", set_(_B, torch.zeros(97, 4))),
    ("B-too-short", "shape", set_(_B, torch.zeros(32, 4))),
    ("B-other-rank", "shape", set_(_B, torch.zeros(96, 5))),
    ("A-transposed", "shape", set_(_A, torch.zeros(96, 4))),
    ("rank-0", "shape", rank(0)),
    ("rank-3-undeclared", "rank_mismatch", rank(3)),
    ("rank-8-undeclared", "rank_mismatch", rank(8)),
    ("rank-3-declared-5", "rank_mismatch", rank(3, declared=5)),
    ("rank-513", "rank_too_large", rank(513, declared=513)),
    ("nan-A", "non_finite", value(_A, math.nan)),
    ("nan-B", "non_finite", value(_B, math.nan)),
    ("inf-A", "non_finite", value(_A, math.inf)),
    ("minus-inf-B", "non_finite", value(_B, -math.inf)),
    ("nan-fp16", "non_finite", value(_A, math.nan, torch.float16)),
    ("nan-bf16", "non_finite", value(_A, math.nan, torch.bfloat16)),
    ("subnormal-fp32", "subnormal", value(_A, 1e-40)),
    ("minus-subnormal-fp32", "subnormal", value(_B, -1e-42)),
    ("subnormal-bf16", "subnormal", value(_B, 1e-39, torch.bfloat16)),
    ("alpha-too-large", "relative_norm", config(lora_alpha=10_000)),
    ("rank-pattern-shrinks-divisor", "relative_norm", lambda draft: (
        draft.change(_A, torch.ones(1, 96)), draft.change(_B, torch.ones(96, 1)),
        draft.config.update(rank_pattern={"layers.0.self_attn.q_proj": 1}),
    )),
    ("alpha-pattern-too-large", "relative_norm", config(alpha_pattern={"0.self_attn.q_proj": 1000})),
    ("one-large-value", "relative_norm", value(_B, 1e6)),
]  # fmt: skip


@table(TENSORS)
def test_what_the_tensors_are(
    code: str, spoil: Spoil, tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    draft = Draft()
    spoil(draft)
    assert codes(judge(draft.write(tmp_path / "adapter"), gate, store)) == {code}


def padded(rank: int, others: int) -> Draft:
    """One module of that rank and all others of the other."""
    draft = Draft(config=lora_config(r=others, rank_pattern={K0: rank}), tensors=lora(rank=others))
    draft.change(key(K0, "A"), torch.full((rank, 96), 1e-3))
    draft.change(key(K0, "B"), torch.full((32, rank), 1e-3))
    return draft


def test_one_large_rank_must_not_blow_up_all_others(
    tmp_path: Path, gate: GateSettings, store: PublishedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM reads one rank, so the others are padded: 2,720 rows and columns in all, of 4 bytes each."""
    folder = padded(512, 1).write(tmp_path / "a")
    size = (folder / "adapter_model.safetensors").stat().st_size
    enough = dataclasses.replace(gate, limits=Limits(weights_bytes=512 * 2720 * 4))
    assert size < 0.06 * enough.limits.weights_bytes
    assert judge(folder, enough, store).report.accepted
    monkeypatch.setattr("safelora_vllm.adapters.canonical.load", lambda _: pytest.fail("loaded"))
    less = dataclasses.replace(gate, limits=Limits(weights_bytes=512 * 2720 * 4 - 1))
    admission = judge(folder, less, PublishedStore(tmp_path / "empty"))
    assert codes(admission) == {"too_large"}
    assert "rank 512 it takes 5,570,560 bytes, allowed are 5,570,559" in admission.report.reasons[0].detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_of_one_rank_and_just_the_allowed_size_is_accepted(
    dtype: torch.dtype, tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    draft = padded(4, 4)
    draft.tensors = {name: tensor.to(dtype) for name, tensor in draft.tensors.items()}
    folder = draft.write(tmp_path / "a")
    size = (folder / "adapter_model.safetensors").stat().st_size
    limited = dataclasses.replace(gate, limits=Limits(weights_bytes=size))
    assert judge(folder, limited, store).report.accepted
    limited = dataclasses.replace(gate, limits=Limits(weights_bytes=size - 1))
    assert codes(judge(folder, limited, PublishedStore(tmp_path / "empty"))) == {"too_large"}


def test_rslora_scales_what_would_else_pass(
    tmp_path: Path, cache: ProjectorCache, store: PublishedStore
) -> None:
    draft = Draft()
    report = judge(draft.write(tmp_path / "a"), GateSettings(cache, Policy()), store).report
    largest = max(report.values("relative_norm"))
    # α/√4 is twice α/4: between the two norms the first passes and the second does not.
    settings = GateSettings(cache, Policy(max_relative_norm=1.5 * largest))
    assert judge(tmp_path / "a", settings, store).report.accepted
    draft.config["use_rslora"] = True
    report = judge(draft.write(tmp_path / "b"), settings, PublishedStore(tmp_path / "empty")).report
    assert {reason.code for reason in report.reasons} == {"relative_norm"}
    assert max(report.values("relative_norm")) == pytest.approx(2 * largest, rel=1e-12)


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 1e40}, {"lora_alpha": 1e300}, {"alpha_pattern": {"q_proj": 1e308}}]
)
@pytest.mark.parametrize("mode", ["enforce", "audit"])
def test_a_scale_beyond_float32(
    changes: dict[str, object], mode: str, tmp_path: Path, cache: ProjectorCache, store: PublishedStore
) -> None:
    draft = Draft()
    draft.config.update(changes)
    admission = judge(draft.write(tmp_path / "a"), GateSettings(cache, Policy(mode=mode)), store)
    assert not admission.report.accepted and "non_finite" in codes(admission)


def test_values_that_the_served_dtype_cannot_hold(
    tmp_path: Path, cache: ProjectorCache, store: PublishedStore
) -> None:
    draft = Draft()
    draft.tensors[_A] *= 1e-7
    draft.tensors[_B] *= 1e7  # up to 2e6 with the scale; float16 ends at 65504
    folder = draft.write(tmp_path / "a")
    policy = Policy(threshold=-1.0)
    fine = judge(folder, GateSettings(cache, policy), PublishedStore(tmp_path / "other"))
    assert fine.report.accepted
    assert codes(judge(folder, GateSettings(cache, policy, dtype=torch.float16), store)) == {"non_finite"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtypes_that_are_served(
    dtype: torch.dtype, tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    draft = Draft()
    draft.tensors = {name: tensor.to(dtype) for name, tensor in draft.tensors.items()}
    assert judge(draft.write(tmp_path / "a"), gate, store).report.accepted


def test_small_float16_values_are_ordinary(tmp_path: Path, gate: GateSettings, store: PublishedStore) -> None:
    draft = Draft()
    value(_A, 1e-6, torch.float16)(draft)
    value(_B, -6e-8, torch.float16)(draft)
    assert draft.tensors[_A][0, 0] != 0 and draft.tensors[_B][0, 0] != 0
    assert judge(draft.write(tmp_path / "a"), gate, store).report.accepted


def test_zeros_are_not_subnormal_and_a_zero_delta_is_kept(
    tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    draft = Draft()
    draft.change(_B, torch.zeros(96, 4))
    draft.change(key(K0, "B"), -torch.zeros(32, 4))
    report = judge(draft.write(tmp_path / "a"), gate, store).report
    modules = {module.name: module for module in report.modules}
    for name in (Q0, K0):
        assert modules[name].decision == "kept" and modules[name].relative_norm == 0.0
        assert modules[name].similarity is modules[name].retained is None
    assert report.accepted and modules[UP0].similarity is not None
