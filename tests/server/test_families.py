"""Families other than Llama: built, loaded, and their slots read. What is not covered is refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from safelora_vllm.adapters.canonical import vet
from safelora_vllm.adapters.read import Limits, read_adapter
from safelora_vllm.errors import AdapterRefused
from safelora_vllm.projectors.build import build
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.manifest import natural_order
from tests.server import slots
from tests.server.slots import Adapter, Engine
from tests.server.small_models import Pair, make_adapter, make_pair

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},  # biases on q, k and v
    "qwen3": {},  # norms on q and k
    # All query heads share one of keys and values, and as in all released ones embeddings are the head too.
    "gemma": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True},
    "mistral": {},
    "phi3": {},  # qkv_proj and gate_up_proj are one weight each
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4},
}
MOE = {"qwen2_moe", "qwen3_moe", "mixtral"}
FUSED = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
SEPARATE = {*ATTENTION, "gate_proj", "up_proj", "down_proj"}


REFUSED_STEPS = {"each": 0, "stacked": 1}  # the first steps of the families with experts


def write_adapter(folder: Path, shapes: dict[str, tuple[int, int]], config: dict[str, Any]) -> Path:
    """An adapter of rank 2 for modules of these shapes (d_out, d_in)."""
    tensors = {}
    for module, (d_out, d_in) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.ones(2, d_in)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.ones(d_out, 2)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def adapters_of_experts(folder: Path, pair: Pair) -> dict[str, Path]:
    """For every expert of the checkpoint by its own name, and what PEFT makes of all linear layers."""
    names = [module for module in sorted(pair.weights.modules()) if ".experts." in module]
    shapes = {module: tuple(pair.weights.w(module).shape) for module in names}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["experts"]}
    each = write_adapter(folder / "each", shapes, config)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    stacked = make_adapter(
        folder / "stacked",
        pair.weights,
        pair.aligned,
        0,
        r=2,
        target_modules=[],
        target_parameters=parameters,
    )
    return {"each": each, "stacked": stacked.folder}


@dataclass(frozen=True)
class Family:
    """A family's pair, its adapter, what the engine answered, and the folder of its slots and store."""

    pair: Pair
    adapter: Adapter
    answers: list[Any]
    folder: Path


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    """All engines follow each other in one process."""
    root = tmp_path_factory.mktemp("families")
    pairs = {family: make_pair(root / family, family, **changes) for family, changes in FAMILIES.items()}
    adapters, engines = {}, []
    for seed, (family, pair) in enumerate(pairs.items()):
        targets = {"target_modules": ATTENTION} if family in ("qwen3_moe", "mixtral") else {}
        adapters[family] = make_adapter(
            root / family / "adapter", pair.weights, pair.aligned, seed, r=4, lora_alpha=6, **targets
        )
        options = slots.options(
            pair.projectors,
            root / family / "store",
            {"method": "safe-lora", "select": "all"},
            dtype="float32",
            max_lora_rank=8,
            **slots.IN_PROCESS,
        )
        engine = Engine(str(pair.aligned), options)
        if family in MOE:
            for form, folder in adapters_of_experts(root / family, pair).items():
                assert engine.add("load", form, 2, str(folder)) == REFUSED_STEPS[form]
        engine.add("load", family, 1, str(adapters[family].folder))
        engine.add("slots", 1, str(root / family / "slots"))
        if family not in MOE:  # vLLM computes experts next to LoRA by Triton, which CPUs do not have
            engine.add("say", family, 1, str(adapters[family].folder))
        engines.append(engine)
    answers = slots.run(engines, root, slots.ONE_PROCESS, seconds=400)
    return {
        family: Family(pair, adapters[family], said, root / family)
        for (family, pair), said in zip(pairs.items(), answers, strict=True)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_slots(families: dict[str, Family], family: str) -> None:
    found = families[family]
    loaded, place, *said = found.answers[len(REFUSED_STEPS) if family in MOE else 0 :]
    assert loaded is True and all(len(tokens) == 4 for tokens in said)
    read = slots.read(found.folder / "slots")
    published = slots.published(found.folder / "store", found.adapter.folder)
    assert slots.from_published(read, published) == 0.0
    assert place[0]["elsewhere"] == 0.0
    worst = slots.from_projection(read, found.adapter, found.pair.weights)
    assert worst < slots.TOLERANCE[torch.float32]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_covered(families: dict[str, Family], family: str) -> None:
    """PEFT's linear layers are those of the cache, and vLLM has a slot for each, fused or not."""
    found = families[family]
    covered = set(ProjectorCache(found.pair.projectors).modules)
    assert covered == set(found.adapter.scales)
    assert covered <= slots.read(found.folder / "slots").keys()
    parts = {module.rpartition(".")[2] for module in covered}
    expected = FUSED if family == "phi3" else SEPARATE
    if family in MOE:
        expected = set(ATTENTION) if family != "qwen2_moe" else SEPARATE | {"shared_expert_gate"}
    assert parts == expected


@pytest.mark.parametrize("family", sorted(MOE))
@pytest.mark.parametrize("form", ["each", "stacked"])
def test_experts_are_refused_by_name(families: dict[str, Family], family: str, form: str) -> None:
    """As older PEFT saves them, a module for each expert, and as PEFT has them since transformers 5."""
    answer = families[family].answers[REFUSED_STEPS[form]]["error"]
    assert "[no_projector]" in answer and "no projector" in answer
    assert "model.layers.0." in answer and ".experts" in answer


# Names of public checkpoints: the language model's, then what stands around it.
MULTIMODAL = {
    "llava": (
        "language_model.model.layers.0.self_attn.q_proj",
        ["vision_tower.vision_model.encoder.layers.0.self_attn.q_proj"],
    ),
    "video_llava": (
        "language_model.model.layers.0.self_attn.q_proj",
        ["video_tower.encoder.layers.0.self_attn.q_proj", "image_tower.encoder.layers.0.self_attn.q_proj"],
    ),
    "qwen2_vl": ("model.layers.0.self_attn.q_proj", ["visual.blocks.0.attn.qkv", "visual.merger.mlp.0"]),
    "qwen2_audio": ("language_model.model.layers.0.mlp.up_proj", ["audio_tower.layers.0.self_attn.q_proj"]),
    "gemma3": (
        "language_model.model.layers.0.self_attn.q_proj",
        ["vision_tower.vision_model.encoder.layers.0.mlp.fc1"],
    ),
    "idefics3": (
        "model.text_model.layers.0.self_attn.q_proj",
        [
            "model.vision_model.encoder.layers.0.mlp.fc1",
            "model.connector.resampler.layers.0.up_proj",
        ],
    ),
    "blip-2": (
        "language_model.model.decoder.layers.0.self_attn.q_proj",
        ["qformer.encoder.layer.0.attention.attention.query", "vision_model.encoder.layers.0.mlp.fc1"],
    ),
    "granite_speech": (
        "language_model.model.layers.0.self_attn.q_proj",
        ["encoder.layers.0.attn.to_q", "projector.qformer.encoder.layer.0.attention.attention.query"],
    ),
    "minicpmv": ("llm.model.layers.0.self_attn.q_proj", ["vpm.encoder.layers.0.self_attn.q_proj"]),
    "internvl_chat": (
        "language_model.model.layers.0.self_attn.q_proj",
        ["vision_model.encoder.layers.0.attn.qkv", "mlp1.1"],
    ),
}


@pytest.mark.parametrize("family", MULTIMODAL)
def test_multimodal_towers_are_refused_by_name(family: str, tmp_path: Path) -> None:
    """The language model can have projectors; an adapter that goes beyond it is refused, tower by tower."""
    language, towers = MULTIMODAL[family]
    for side, seed in (("base", 0), ("aligned", 1)):
        generator = torch.Generator().manual_seed(seed)
        weights = {f"{name}.weight": torch.randn(8, 8, generator=generator) for name in (language, *towers)}
        (tmp_path / side).mkdir()
        save_file(weights, tmp_path / side / "model.safetensors")
        (tmp_path / side / "config.json").write_text(json.dumps({"model_type": family}))
    build(tmp_path / "base", tmp_path / "aligned", tmp_path / "projectors")
    covered = ProjectorCache(tmp_path / "projectors").modules
    assert set(covered) == {language}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": "all-linear"}
    for modules in ([language], [language, *towers]):
        adapter = tmp_path / f"adapter-{len(modules)}"
        write_adapter(adapter, dict.fromkeys(modules, (8, 8)), config)
    vet(read_adapter(tmp_path / "adapter-1", Limits()), covered, Limits())
    with pytest.raises(AdapterRefused) as info:
        vet(read_adapter(adapter, Limits()), covered, Limits())
    assert info.value.codes == ["no_projector"]
    named = sorted(towers, key=natural_order)[:3]
    assert ", ".join(named) in str(info.value)
