"""What the tensors are: dtypes, shapes, values, pairs, and names that mean something else."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from tests.corpus.case import Hostile, Spoil, neutralised, spoiled
from tests.corpus.target import SCALE
from tests.tiny import Q0, Draft, key

_A, _B = key(Q0, "A"), key(Q0, "B")
_LONG = "base_model.model." + "a" * 600 + ".lora_{}.weight"


def add(name: str, shape: tuple[int, ...] = (96,)) -> Spoil:
    """One more tensor."""
    return lambda draft: draft.tensors.update({name: torch.zeros(shape)})


def beside(name: str) -> Spoil:
    """A's values once more, under an alias."""
    return lambda draft: draft.tensors.update({name: draft.tensors[_A].clone()})


def rename(template: str) -> Spoil:
    """Both names of q_proj in another spelling; ``{}`` stands for A and B."""

    def spoil(draft: Draft) -> None:
        for side in "AB":
            draft.rename(key(Q0, side), template.format(side))

    return spoil


def drop(name: str) -> Spoil:
    """Leave a tensor out, at the scale 1, where nothing is multiplied before it is missed."""

    def spoil(draft: Draft) -> None:
        draft.tensors.pop(name)
        draft.config["lora_alpha"] = draft.config["r"]

    return spoil


def shaped(name: str, shape: Callable[[int, int], tuple[int, ...]]) -> Spoil:
    """Zeros of another shape, which is said from the right one."""
    return lambda draft: draft.change(name, torch.zeros(shape(*draft.tensors[name].shape)))


def value(name: str, number: float, dtype: torch.dtype = torch.float32) -> Spoil:
    """One value of a tensor, all of it in the dtype."""

    def spoil(draft: Draft) -> None:
        tensor = draft.tensors[name].to(dtype)
        tensor[0, 0] = number
        draft.change(name, tensor)

    return spoil


def filled(number: float) -> Spoil:
    """The same value in every place of every tensor."""
    return lambda draft: [tensor.fill_(number) for tensor in draft.tensors.values()]


def cast(dtype: torch.dtype) -> Spoil:
    """Both tensors of q_proj in another dtype."""
    return lambda draft: [draft.change(name, draft.tensors[name].to(dtype)) for name in (_A, _B)]


def rank(count: int, declared: int | None = None) -> Spoil:
    """q_proj with another rank."""

    def spoil(draft: Draft) -> None:
        shaped(_A, lambda _, d_in: (count, d_in))(draft)
        shaped(_B, lambda d_out, _: (d_out, count))(draft)
        if declared is not None:
            draft.config["rank_pattern"] = {"layers.0.self_attn.q_proj": declared}

    return spoil


def padded(draft: Draft) -> None:
    """One module of rank 512 and all others of rank 1, which vLLM would have padded to 512."""
    for name, tensor in draft.tensors.items():
        draft.tensors[name] = tensor[:1] if ".lora_A." in name else tensor[:, :1]
    rank(512)(draft)
    draft.config |= {"r": 1, "lora_alpha": 2, "rank_pattern": {"layers.0.self_attn.q_proj": 512}}


def identical_ranks(draft: Draft) -> None:
    """Every rank of q_proj the same one: four times as much of it."""
    for name, dim in ((_A, 0), (_B, 1)):
        tensor = draft.tensors[name]
        draft.change(name, tensor.narrow(dim, 0, 1).expand_as(tensor) / 2)


TENSORS: list[tuple[str, str, Spoil]] = [
    ("no-prefix", "unknown_tensor", rename(Q0 + ".lora_{}.weight")),
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
    ("alias-beside", "unknown_tensor", beside(f"base_model.model.{Q0}.lora_A.default.weight")),
    ("alias-without-prefix", "unknown_tensor", beside(f"{Q0}.lora_A.weight")),
    ("only-A", "unpaired", drop(_B)),
    ("only-B", "unpaired", drop(_A)),
    ("fp64", "dtype", cast(torch.float64)),
    ("int8", "dtype", cast(torch.int8)),
    ("int64", "dtype", cast(torch.int64)),
    ("bool", "dtype", cast(torch.bool)),
    ("fp8", "dtype", cast(torch.float8_e4m3fn)),
    ("complex", "dtype", cast(torch.complex64)),
    ("A-1-D", "shape", shaped(_A, lambda _, d_in: (d_in,))),
    ("B-1-D", "shape", shaped(_B, lambda d_out, _: (d_out,))),
    ("A-3-D", "shape", shaped(_A, lambda r, d_in: (1, r, d_in))),
    ("B-3-D", "shape", shaped(_B, lambda d_out, r: (d_out, r, 1))),
    ("A-0-D", "shape", shaped(_A, lambda *_: ())),
    ("A-too-wide", "shape", shaped(_A, lambda r, d_in: (r, d_in + 1))),
    ("A-too-narrow", "shape", shaped(_A, lambda r, d_in: (r, d_in // 3))),
    ("B-too-tall", "shape", shaped(_B, lambda d_out, r: (d_out + 1, r))),
    ("B-too-short", "shape", shaped(_B, lambda d_out, r: (d_out // 3, r))),
    ("B-other-rank", "shape", shaped(_B, lambda d_out, r: (d_out, r + 1))),
    ("A-transposed", "shape", shaped(_A, lambda r, d_in: (d_in, r))),
    ("rank-0", "shape", rank(0)),
    ("rank-3-undeclared", "rank_mismatch", rank(3)),
    ("rank-8-undeclared", "rank_mismatch", rank(8)),
    ("rank-3-declared-5", "rank_mismatch", rank(3, declared=5)),
    ("rank-10000", "rank_too_large too_large", rank(10_000, declared=10_000)),
    ("rank-513", "rank_too_large", rank(513, declared=513)),
    ("nan-A", "non_finite", value(_A, math.nan)),
    ("nan-B", "non_finite", value(_B, math.nan)),
    ("nan-everywhere", "non_finite", filled(math.nan)),
    ("inf-A", "non_finite", value(_A, math.inf)),
    ("minus-inf-B", "non_finite", value(_B, -math.inf)),
    ("nan-fp16", "non_finite", value(_A, math.nan, torch.float16)),
    ("nan-bf16", "non_finite", value(_A, math.nan, torch.bfloat16)),
    ("subnormal-fp32", "subnormal", value(_A, 1e-40)),
    ("minus-subnormal-fp32", "subnormal", value(_B, -1e-42)),
    ("subnormal-bf16", "subnormal", value(_B, 1e-39, torch.bfloat16)),
    ("subnormal-everywhere", "subnormal", filled(1e-40)),
]

HARMLESS: list[tuple[str, Spoil]] = [
    ("zeros", lambda draft: draft.tensors[_B].zero_()),
    ("minus-zeros", lambda draft: draft.change(_B, -torch.zeros_like(draft.tensors[_B]))),
    ("identical-ranks", identical_ranks),
    ("small-fp16", value(_A, 1e-6, torch.float16)),
    ("mixed-dtypes", lambda draft: draft.change(_A, draft.tensors[_A].bfloat16())),
]

CASES: list[Hostile] = [
    *[spoiled(name, "tensors", codes, spoil) for name, codes, spoil in TENSORS],
    *[neutralised(name, "tensors", spoil) for name, spoil in HARMLESS],
    spoiled("one-large-rank", "tensors", "rank_too_large too_large", padded, lambda _: SCALE),
]
