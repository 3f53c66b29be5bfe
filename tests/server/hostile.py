"""A few hostile adapters for the live server; the fast tests hold the whole table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from safelora_vllm.projectors.cache import ProjectorCache
from tests.server.conftest import Q_V, write_adapter

Spoil = Callable[[Path, ProjectorCache], None]


def _tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Spoil:
    def spoil(folder: Path, cache: ProjectorCache) -> None:
        write_adapter(folder, cache, Q_V, 8, seed=9)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")

    return spoil


def _config(**values: object) -> Spoil:
    def spoil(folder: Path, cache: ProjectorCache) -> None:
        write_adapter(folder, cache, Q_V, 8, seed=9)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def _fifo(folder: Path, cache: ProjectorCache) -> None:
    write_adapter(folder, cache, Q_V, 8, seed=9)
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")


def _truncated(folder: Path, cache: ProjectorCache) -> None:
    write_adapter(folder, cache, Q_V, 8, seed=9)
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(iter(tensors))][0, 0] = float("nan")


def _layer_9999(tensors: dict[str, torch.Tensor]) -> None:
    for side, shape in (("A", (8, 576)), ("B", (576, 8))):
        name = f"base_model.model.model.layers.9999.self_attn.q_proj.lora_{side}.weight"
        tensors[name] = torch.ones(shape)


def _lm_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(8, 576)
    tensors["base_model.model.lm_head.lora_B.weight"] = torch.ones(49152, 8)


HOSTILE: dict[str, tuple[Spoil, str]] = {
    "fifo": (_fifo, "not_regular_file"),
    "truncated": (_truncated, "weights_malformed"),
    "nan": (_tensors(_nan), "non_finite"),
    "layer-9999": (_tensors(_layer_9999), "no_projector"),
    "lm-head": (_tensors(_lm_head), "no_projector"),
    "huge-alpha": (_config(lora_alpha=1e9), "relative_norm"),
    "regex": (_config(rank_pattern={"(a|a)*$": 8}), "pattern"),
    "dora": (_config(use_dora=True), "dora"),
}
