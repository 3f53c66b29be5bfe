"""Small random models of real families, in pairs, and adapters for them as PEFT saves them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from safelora_vllm.projectors.build import BuildOptions, build
from tests.server.conftest import CACHE
from tests.server.slots import Adapter, Weights, one_thread

# Even numbers of heads, so that two ranks can share them; head sizes that vLLM's attention on CPUs knows.
SMALL = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 49152, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": False,
    "initializer_range": 0.1,  # large enough that the layers, and so adapters, change what is said
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A base model, the aligned one, and their projector cache."""

    base: Path
    aligned: Path
    projectors: Path

    @property
    def weights(self) -> Weights:
        return Weights(self.base, self.aligned)


@one_thread()
def make_pair(folder: Path, family: str, **changes: Any) -> Pair:
    """A pair of which every linear weight differs by a small delta of rank 4, with a float32 cache."""
    pair = Pair(folder / "base", folder / "aligned", folder / "projectors")
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(pair.base)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ".layers." in name:
                weight += 0.01 * torch.randn(len(weight), 4) @ torch.randn(4, weight.shape[1])
    model.save_pretrained(pair.aligned)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CACHE / "models" / "aligned" / file, pair.aligned)
    build(pair.base, pair.aligned, pair.projectors, BuildOptions(exact=True, dtype="float32"))
    return pair


def make_adapter(
    folder: Path, weights: Weights, model: Path, seed: int, dtype: torch.dtype = torch.float32, **lora: Any
) -> Adapter:
    """Config, names and scales by PEFT, values random: each delta is 0.3 times its weight's norm."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": "all-linear", **lora})
        wrapped = get_peft_model(empty, config)
    scales = {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        for name, layer in wrapped.named_modules()
        if isinstance(layer, LoraLayer)
    }
    generator = torch.Generator().manual_seed(seed)
    state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    tensors = {name: torch.randn(state[name].shape, generator=generator) for name in sorted(state)}
    known = weights.modules()
    for module, scale in scales.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        if module in known:
            b *= 0.3 * weights.w(module).norm() / (scale * (b @ a).norm())
    wrapped.peft_config["default"].save_pretrained(folder)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return Adapter(folder, scales)
