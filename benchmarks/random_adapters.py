"""Random adapters that the gate accepts: the right names and shapes, one hundredth of each weight's norm."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from safelora_vllm.methods import lowrank
from safelora_vllm.projectors.cache import ProjectorCache

KINDS = {"qv-r8": "q, v, r = 8", "all-r16": "all linear, r = 16"}
_RELATIVE_NORM = 0.01
_PARTS = {"qv-r8": ("q_proj", "v_proj"), "all-r16": ()}
_RANKS = {"qv-r8": 8, "all-r16": 16}


def write_adapters(
    folder: Path, projectors: Path, count: int, kinds: Iterable[str] = tuple(KINDS)
) -> dict[str, list[Path]]:
    """``count`` adapters of each kind, and one more to warm up with, each a PEFT folder."""
    torch.manual_seed(0)
    cache = ProjectorCache(projectors)
    names = {kind: [f"{kind}-{index}" for index in range(count + 1)] for kind in kinds}
    return {kind: [_write(folder / name, cache, kind) for name in found] for kind, found in names.items()}


def _write(folder: Path, cache: ProjectorCache, kind: str) -> Path:
    rank, tensors, parts = _RANKS[kind], {}, set()
    for name, entry in cache.modules.items():
        part = name.rpartition(".")[2]
        if _PARTS[kind] and part not in _PARTS[kind]:
            continue
        parts.add(part)
        d_out, d_in = entry.shape
        a, b = torch.randn(rank, d_in) / d_in**0.5, torch.randn(d_out, rank)
        b *= (
            _RELATIVE_NORM
            * entry.aligned_norm
            / float(lowrank.norm_sums(lowrank.gram(b.mT), lowrank.gram(a))[0].sqrt())
        )
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": rank, "lora_alpha": rank}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": sorted(parts)}))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
