"""Families other than Llama: built, loaded, and their slots read. What is not covered is refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from safelora_vllm.projectors.cache import ProjectorCache
from tests.server import slots
from tests.server.slots import Adapter, Engine, Slots
from tests.server.small_models import Pair, make_adapter, make_pair

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},  # biases on q, k and v
    "qwen3": {},  # norms on q and k
    "gemma": {"num_key_value_heads": 1},  # one head for all keys and values
    "gemma3_text": {},
    "mistral": {},
    "phi3": {},  # qkv_proj and gate_up_proj are one weight each
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "mixtral": {"num_local_experts": 4},
}
MOE = [family for family in FAMILIES if family in ("qwen2_moe", "qwen3_moe", "mixtral")]
DENSE = [family for family in FAMILIES if family not in MOE]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
