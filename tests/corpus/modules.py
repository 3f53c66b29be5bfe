"""Deltas where nothing could be projected, and tensors that only other PEFT features have."""

from __future__ import annotations

import torch

from tests.corpus.case import Hostile, Make, Spoil, made, spoiled
from tests.corpus.target import Target, sound
from tests.corpus.tensors import add, rename
from tests.tiny import Q0, Draft, key


def move(new: str) -> Spoil:
    """Both tensors of q_proj under another module's name."""
    return lambda draft: draft.move(Q0, new)


def one_more(module: str) -> Spoil:
    """q_proj's tensors once more, under a further module's name."""

    def spoil(draft: Draft) -> None:
        for side in "AB":
            draft.tensors[key(module, side)] = draft.tensors[key(Q0, side)].clone()

    return spoil


def vocabulary(name: str, inputs: bool, sides: tuple[str, str] = ("lora_A.weight", "lora_B.weight")) -> Make:
    """A delta of the right shape on the embeddings (whose input is the vocabulary) or on the head."""

    def make(target: Target) -> Draft:
        draft, hidden = sound(target), target.modules[Q0].shape[1]
        d_out, d_in = (hidden, target.vocabulary) if inputs else (target.vocabulary, hidden)
        for side, shape in zip(sides, ((4, d_in), (d_out, 4)), strict=True):
            draft.tensors[f"base_model.model.{name}.{side}"] = torch.full(shape, 0.01)
        return draft

    return make


MODULES: list[tuple[str, str, Spoil]] = [
    ("embeddings-by-name", "no_projector", move("model.embed_tokens")),
    ("head-by-name", "no_projector", move("lm_head")),
    ("norm", "no_projector", move("model.layers.0.input_layernorm")),
    ("final-norm", "no_projector", move("model.norm")),
    ("expert", "no_projector", move("model.layers.0.mlp.experts.0.up_proj")),
    ("stacked-experts", "no_projector", move("model.layers.0.mlp.experts")),
    ("router", "no_projector", move("model.layers.0.mlp.gate")),
    ("vision-tower", "no_projector", move("vision_tower.layers.0.self_attn.q_proj")),
    ("layer-9999", "no_projector", move("model.layers.9999.self_attn.q_proj")),
    ("layer-9999-beside", "no_projector", one_more("model.layers.9999.self_attn.q_proj")),
    ("layer-00", "no_projector", move("model.layers.00.self_attn.q_proj")),
    ("layer-00-beside", "no_projector", one_more("model.layers.00.self_attn.q_proj")),
    ("fused", "no_projector", move("model.layers.0.self_attn.qkv_proj")),
    ("suffix-only", "no_projector", move("q_proj")),
    ("upper-case", "no_projector", move(Q0.upper())),
    ("double-dot", "no_projector", move(Q0.replace(".", "..", 1))),
    ("dot-before", "no_projector", move("." + Q0)),
    ("dot-behind", "no_projector", move(Q0 + ".")),
    ("prefix-twice", "no_projector", move("base_model.model." + Q0)),
    ("half-prefix", "no_projector", rename(f"base_model.{Q0}.lora_{{}}.weight")),
]

FEATURES: list[tuple[str, str, Spoil]] = [
    ("whole-weight", "unknown_tensor", add(f"base_model.model.{Q0}.weight", (96, 96))),
    ("base-layer", "unknown_tensor", add(f"base_model.model.{Q0}.base_layer.weight", (96, 96))),
    ("magnitude", "dora", add(f"base_model.model.{Q0}.lora_magnitude_vector")),
    ("magnitude-weight", "dora", add(f"base_model.model.{Q0}.lora_magnitude_vector.weight")),
    ("saved-head", "modules_to_save", add("base_model.model.lm_head.modules_to_save.weight", (64, 96))),
    ("tokens", "trainable_tokens", add("base_model.model.embed_tokens.trainable_tokens_delta", (1, 96))),
    ("bias", "bias", add(f"base_model.model.{Q0}.bias")),
    ("lora-bias", "bias", add(f"base_model.model.{Q0}.lora_B.bias")),
    ("base-embeddings", "unknown_tensor", add("base_model.model.embed_tokens.base_layer.weight", (64, 96))),
]

_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
CASES: list[Hostile] = [
    *[spoiled(name, "no-projector", codes, spoil) for name, codes, spoil in MODULES],
    made("embeddings", "no-projector", "embedding", vocabulary("model.embed_tokens", True, _EMBEDDING)),
    made("embeddings-as-linear", "no-projector", "no_projector", vocabulary("model.embed_tokens", True)),
    made("head", "no-projector", "no_projector", vocabulary("lm_head", False)),
    *[spoiled(name, "features", codes, spoil) for name, codes, spoil in FEATURES],
]
