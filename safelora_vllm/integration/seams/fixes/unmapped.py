"""Loaded weights have memory of their own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from safelora_vllm.integration.seams.fixes.fix import Fix, replace
from safelora_vllm.integration.seams.table import Requirement


class InMemorySafeOpen:
    """A safetensors file read into memory, with those calls of ``safe_open`` that vLLM makes.

    A mapped file that is cut short would end the engine at its next look at the weights, on a CPU, and one
    that is written to would change what is served. And safetensors 0.8 keeps two numbers for ever for each
    tensor that it reads from a map: where adapters are read again all day, megabytes an hour.
    """

    def __init__(self, path: str, framework: str) -> None:
        from safetensors.torch import load

        assert framework == "pt", framework
        self._tensors = load(Path(path).read_bytes())
        self.keys, self.get_tensor = self._tensors.keys, self._tensors.__getitem__

    def __enter__(self) -> InMemorySafeOpen:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""


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
