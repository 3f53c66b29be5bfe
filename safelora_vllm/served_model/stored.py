"""Values of a served weight at sampled places, and which values of the original they may stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safelora_vllm.errors import CheckpointError
from safelora_vllm.projectors.checkpoint import Checkpoint

DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "I64": torch.int64,
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
TRUST = "If you know that it is a copy of the aligned model, say so with `trust_served_model`"


@dataclass(frozen=True)
class Stored:
    """Samples (rows, 8) of one weight (d_out, d_in), all float64.

    Attributes:
        form: what it is stored as, for messages.
        values: what is stored, as a number.
        below, above: an original of this value that was rounded to the nearest is at most so far from it.
        expected: the square of the error that rounding to the nearest is expected to have made.
        calibrated: whether tools for this form also round otherwise, to lessen the error of the outputs.
        reach: the largest absolute value that the scale of each sample can stand for; None without scales.
        clipped: samples at the last value of their scale, which may stand for larger ones.
        size: how many columns of a row have one scale.
        near: how many rows a row that has the same scale can be away; 0 where each row has its own.
    """

    form: str
    values: Tensor
    below: Tensor
    above: Tensor
    expected: Tensor
    calibrated: bool
    reach: Tensor | None = None
    clipped: Tensor | None = None
    size: int = 1
    near: int = 0


@dataclass(frozen=True)
class Place:
    """A weight of the served model and where it is sampled.

    columns: (d_out, 8), the sampled ones of each row.
    """

    model: Checkpoint
    module: str
    shape: tuple[int, int]
    columns: Tensor

    @property
    def rows(self) -> Tensor:
        """(d_out, 1), to index with beside ``columns``."""
        return torch.arange(self.shape[0])[:, None]

    def has(self, suffix: str) -> bool:
        """Whether there is a tensor ``MODULE.suffix``."""
        return f"{self.module}.{suffix}" in self.model.tensors

    def tensor(self, suffix: str, dtypes: Sequence[str], *shapes: Sequence[int]) -> Tensor:
        """A tensor of the module.

        Raises:
            CheckpointError: none, or another dtype or shape than expected.
        """
        name = f"{self.module}.{suffix}"
        if (info := self.model.tensors.get(name)) is None:
            raise CheckpointError(f"{self.model.folder} has no tensor {name}; download the model again")
        expected = [tuple(shape) for shape in shapes]
        if info.dtype not in dtypes or (expected and info.shape not in expected):
            raise CheckpointError(
                f"{name} in {self.model.folder} is {info.dtype} {info.shape}: expected {' or '.join(dtypes)} "
                f"{' or '.join(map(str, expected))}. This form cannot be compared with the aligned model. "
                f"{TRUST}"
            )
        dtype = DTYPES[info.dtype]
        if torch.Size(info.shape).numel() * dtype.itemsize != info.nbytes:
            raise CheckpointError(f"{name} in {self.model.folder} has {info.nbytes} bytes; download it again")
        return torch.frombuffer(self.model.raw(name), dtype=dtype).reshape(info.shape)

    def shape_of(self, suffix: str) -> tuple[int, ...]:
        """Of a tensor of the module; empty where there is none."""
        info = self.model.tensors.get(f"{self.module}.{suffix}")
        return info.shape if info is not None else ()

    def cannot(self, found: str) -> CheckpointError:
        """The error for a form that is not read."""
        return CheckpointError(
            f"{self.module} in {self.model.folder} is {found}. This form cannot be compared with the aligned "
            f"model. {TRUST}"
        )


def steps(
    form: str, codes: Tensor, zero: Tensor, scale: Tensor, ends: tuple[int, int], size: int, near: int = 0
) -> Stored:
    """Integers q (rows, 8) that stand for (q − z)·s. Beyond both ends values are clipped.

    Tools clip to lessen the error of the others. No tool clips a value to less than half of it.
    """
    step = scale.to(torch.float64).abs().expand(codes.shape)
    values = (codes.to(torch.float64) - zero.to(torch.float64)) * scale.to(torch.float64)
    half = step / 2
    low, high = codes == ends[0], codes == ends[1]
    negative = scale.expand(codes.shape) < 0
    reach = step * ((ends[1] - ends[0] + 1) / 2)
    below = torch.where(torch.where(negative, high, low), reach, half)
    above = torch.where(torch.where(negative, low, high), reach, half)
    return Stored(
        form, values, below, above, step.square() / 12, calibrated=True,
        reach=reach, clipped=low | high, size=size, near=near,
    )  # fmt: skip


def packed(words: Tensor, row: Tensor, index: Tensor, bits: int) -> Tensor:
    """Unsigned numbers out of int32 words (n, m): number ``index`` of a row, lowest bits first."""
    per = 32 // bits
    found: Tensor = (words[row, index // per].to(torch.int64) & 0xFFFFFFFF) >> (bits * (index % per))
    return torch.bitwise_and(found, 2**bits - 1)
