"""The model that a corpus attacks, and the sound adapter for it that most hostile ones spoil."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.manifest import ModuleEntry
from tests.tiny import Draft, key, lora_config

Deltas = dict[str, Tensor]  # module → ΔW (d_out, d_in), float64
SCALE = 2.0  # α/r of `lora_config`


@dataclass(frozen=True)
class Target:
    """A model pair as an attacker knows it: shapes and norms of its modules, V of each, its vocabulary.

    modules: as in `ProjectorCache`. alignment: module → V (d_out, d_in), float64. directions: module → U, S
    and Vᵀ of V's singular value decomposition.
    """

    modules: Mapping[str, ModuleEntry]
    alignment: Callable[[str], Tensor]
    directions: Callable[[str], tuple[Tensor, Tensor, Tensor]]
    vocabulary: int

    @classmethod
    def of(cls, cache: ProjectorCache, base: Path, aligned: Path) -> Target:
        """The pair of two checkpoints in one file each, and of their projector cache."""

        def weight(folder: Path, name: str) -> Tensor:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                tensor: Tensor = file.get_tensor(f"{name}.weight")
                return tensor.double()

        @functools.cache
        def alignment(module: str) -> Tensor:
            return weight(aligned, module) - weight(base, module)

        @functools.cache
        def directions(module: str) -> tuple[Tensor, Tensor, Tensor]:
            left, sizes, right = torch.linalg.svd(alignment(module), full_matrices=False)
            return left, sizes, right

        return cls(cache.modules, alignment, directions, weight(base, "model.embed_tokens").shape[0])

    @property
    def attacked(self) -> dict[str, ModuleEntry]:
        """The modules of the first two layers: enough to attack, quick to write and to judge."""
        layers = ("model.layers.0.", "model.layers.1.")
        return {name: entry for name, entry in self.modules.items() if name.startswith(layers)}


def sized_lora(
    modules: Mapping[str, ModuleEntry], rank: int = 4, seed: int = 7, size: float = 0.3
) -> dict[str, Tensor]:
    """Random A and B; with the scale 2 of their config each delta has ``size`` times its weight's norm."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, entry in modules.items():
        a = torch.randn(rank, entry.shape[1], generator=generator)
        b = torch.randn(entry.shape[0], rank, generator=generator)
        b *= size * entry.aligned_norm / (b @ a).norm() / SCALE
        tensors |= {key(name, "A"): a, key(name, "B"): b}
    return tensors


def sound(target: Target) -> Draft:
    """An adapter that the gate accepts."""
    return Draft(lora_config(), sized_lora(target.attacked))


def deltas(draft: Draft, scale: Callable[[str], float] = lambda _: SCALE) -> Deltas:
    """ΔW = s·B·A of each module in float64. ``scale`` is said by hand: nothing here reads the config."""
    found = {}
    for name, a in draft.tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            found[module] = scale(module) * draft.tensors[key(module, "B")].double() @ a.double()
    return found
