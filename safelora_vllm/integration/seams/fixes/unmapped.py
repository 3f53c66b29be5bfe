"""Loaded weights have memory of their own."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from safelora_vllm.integration.seams.fixes.fix import Fix, replace
from safelora_vllm.integration.seams.table import Requirement

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of published copies


class InMemorySafeOpen:
    """A safetensors file read into memory, with those calls of ``safe_open`` that vLLM makes.

    A mapped file that is cut short would end the engine at its next look at the weights, on a CPU, and one
    that is written to would change what is served. And safetensors 0.8 keeps two numbers for ever for each
    tensor that it reads from a map: where adapters are read again all day, megabytes an hour.

    Its own load holds Python's lock while it copies all tensors, and the engine's steps wait meanwhile.
    Here only the header is parsed; tensors are views of what was read.
    """

    def __init__(self, path: str, framework: str) -> None:
        assert framework == "pt", framework
        data = _read(Path(path))
        start = 8 + int.from_bytes(data[:8].numpy().tobytes(), "little")
        header = json.loads(data[8:start].numpy().tobytes())
        header.pop("__metadata__", None)
        self._tensors = {name: _view(data[start:], line) for name, line in header.items()}
        self.keys, self.get_tensor = self._tensors.keys, self._tensors.__getitem__

    def __enter__(self) -> InMemorySafeOpen:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


def _read(path: Path) -> Tensor:
    """The bytes of a file. Python's lock is free while the system reads; to clear a bytearray, it is held."""
    import torch

    data = torch.empty(path.stat().st_size, dtype=torch.uint8)
    rest = data.numpy().data
    with path.open("rb", buffering=0) as file:
        while rest:
            if not (count := file.readinto(rest)):
                raise EOFError(f"{path} ends before its size")
            rest = rest[count:]
    return data


def _view(data: Tensor, line: dict[str, Any]) -> Tensor:
    """A tensor by its line of the header, in the bytes that offsets count from."""
    import torch

    dtype, (begin, end) = getattr(torch, _DTYPES[line["dtype"]]), line["data_offsets"]
    own = data[begin:end]
    aligned = own if own.storage_offset() % dtype.itemsize == 0 else own.clone()
    return aligned.view(dtype).reshape(line["shape"])


def _apply() -> None:
    from vllm.lora import lora_model

    replace(lora_model, "safetensors", SimpleNamespace(safe_open=InMemorySafeOpen))


UNMAPPED = Fix(
    name="unmapped",
    why=(
        "On CPUs, loaded weights stay mapped from their file: one that is cut short kills the worker, one "
        "that is written to changes what is served. And safetensors 0.8 keeps 56 bytes for each tensor read "
        "from a map."
    ),
    upstream="none found",
    safety="A file that is written to after it was checked would change the served weights.",
    until="vLLM reads adapters without mapping them",
    apply=_apply,
    requirements=(
        Requirement("vllm.lora.lora_model", "safetensors"),
        Requirement(
            "vllm.lora.lora_model", "LoRAModel.from_local_checkpoint",
            references=("safetensors", "safe_open", "get_tensor"),
        ),
    ),
)  # fmt: skip
