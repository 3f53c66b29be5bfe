"""Tiny checkpoints with Llama's names, and adapters for them. Real files, random weights."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, KV, INNER, LAYERS, VOCAB = 96, 32, 144, 2, 64
# All four kinds: square (q, o), d_out < d_in (k, v, down), d_out > d_in (gate, up).
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
Q0, K0, UP0 = (f"model.layers.0.{part}" for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"))
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
}


def module_shapes(layers: int = LAYERS) -> dict[str, tuple[int, int]]:
    """Module name → (d_out, d_in) of all linear layers."""
    return {f"model.layers.{i}.{part}": shape for i in range(layers) for part, shape in SHAPES.items()}


def base_weights(seed: int = 0) -> dict[str, Tensor]:
    """The state of an unaligned model, float32."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": torch.randn(VOCAB, HIDDEN, generator=generator),
    }
    for i in range(LAYERS):
        state[f"model.layers.{i}.input_layernorm.weight"] = torch.ones(HIDDEN)
        state[f"model.layers.{i}.post_attention_layernorm.weight"] = torch.ones(HIDDEN)
    for name, (rows, columns) in module_shapes().items():
        state[f"{name}.weight"] = torch.randn(rows, columns, generator=generator) / columns**0.5
    return state


def aligned_weights(base: dict[str, Tensor], seed: int = 1, step: float = 0.02) -> dict[str, Tensor]:
    """The same model after "alignment": each module moved along a spectrum of its own decay, so
    that the null similarities, and with them the decisions, differ from module to module. The larger the
    step, the larger ‖V‖."""
    generator = torch.Generator().manual_seed(seed)
    state = dict(base)
    for index, (name, (rows, columns)) in enumerate(module_shapes().items()):
        random = torch.randn(rows, columns, generator=generator)
        left, sizes, right = torch.linalg.svd(random, full_matrices=False)
        decay = torch.exp(-0.04 * index * torch.arange(len(sizes)))
        state[f"{name}.weight"] = base[f"{name}.weight"] + step * (left * (sizes * decay)) @ right
    return state


def write_checkpoint(
    folder: Path, state: dict[str, Tensor], shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    """A model folder: ``model.safetensors``, or ``shards`` files with an index, and a config."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA if config is None else config))
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(state)
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


@dataclass(frozen=True)
class Pair:
    """A base and an aligned checkpoint, as folders and as weights."""

    base: Path
    aligned: Path
    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def v(self, module: str) -> Tensor:
        """V = W_aligned − W_base of a module, float64."""
        return self.w(module) - self.before[f"{module}.weight"].double()

    def w(self, module: str) -> Tensor:
        """W_aligned of a module, float64."""
        return self.after[f"{module}.weight"].double()


def write_pair(folder: Path, step: float = 0.02) -> Pair:
    """Both checkpoints of a pair under one folder."""
    before = base_weights()
    after = aligned_weights(before, step=step)
    base = write_checkpoint(folder / "base", before)
    return Pair(base, write_checkpoint(folder / "aligned", after), before, after)


def key(module: str, side: str) -> str:
    """The name that PEFT gives an adapter's tensor."""
    return f"base_model.model.{module}.lora_{side}.weight"


def lora(modules: list[str] | None = None, rank: int = 4, seed: int = 7) -> dict[str, Tensor]:
    """A and B tensors for the modules (default: all), well below the norm cap."""
    generator = torch.Generator().manual_seed(seed)
    shapes = module_shapes()
    tensors = {}
    for module in shapes if modules is None else modules:
        rows, columns = shapes[module]
        tensors[key(module, "A")] = torch.randn(rank, columns, generator=generator) / columns**0.5
        tensors[key(module, "B")] = 0.1 * torch.randn(rows, rank, generator=generator)
    return tensors


def lora_config(**changes: Any) -> dict[str, Any]:
    """A plain LoRA config of rank 4 and scale 2."""
    plain = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": sorted({name.rpartition(".")[2] for name in module_shapes()}),
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
    }
    return {**plain, **changes}


@dataclass
class Draft:
    """An adapter in the making: change config and tensors, then `write` it."""

    config: dict[str, Any] = field(default_factory=lora_config)
    tensors: dict[str, Tensor] = field(default_factory=lora)

    def write(self, folder: Path) -> Path:
        """Save it as PEFT does."""
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config))
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    def rename(self, old: str, new: str) -> None:
        """Rename a tensor."""
        self.tensors[new] = self.tensors.pop(old)

    def move(self, module: str, new: str) -> None:
        """Rename both tensors of a module."""
        for side in "AB":
            self.rename(key(module, side), key(new, side))

    def change(self, name: str, tensor: Tensor) -> None:
        """Replace a tensor."""
        assert name in self.tensors
        self.tensors[name] = tensor


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A hand-made safetensors file; ``length`` overrides the true length of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
