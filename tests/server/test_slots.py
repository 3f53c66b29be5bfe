"""What enters the pool is what was vetted: vLLM's own slots, read after loading, on the real model pair."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.server import slots
from tests.server.conftest import ALL, CACHE
from tests.server.slots import Adapter, Engine, Slots, Weights
from tests.server.small_models import make_adapter

MAX_RANK = 16
SOME = {"layers_to_transform": [0, 1, 3, 5, 29]}  # of 30: the rest of the slot must be empty
# In this order, one after another in one slot: each finds what the one before it left.
CASES: dict[str, dict[str, Any]] = {
    "everything": {"r": 16, "lora_alpha": 32},
    "few_layers": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["v_proj", "up_proj", "o_proj"],
        "layers_to_transform": [0, 7, 29],
    },
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True, **SOME},
    "alpha_pattern": {
        "r": 8,
        "lora_alpha": 8,
        "alpha_pattern": {"q_proj": 32, "layers.3.mlp.up_proj": 4, "model.layers.5.self_attn.v_proj": 1.5},
        **SOME,
    },
    "rank_pattern": {"r": 8, "lora_alpha": 8, "rank_pattern": {"v_proj": 2, "down_proj": 16}, **SOME},
    "patterns_rslora": {
        "r": 6,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"k_proj": 3, "layers.1.mlp.gate_proj": 12},
        "alpha_pattern": {"k_proj": 9, "gate_proj": 24},
        **SOME,
    },
    "float16": {"r": 8, "lora_alpha": 16, "dtype": torch.float16, **SOME},
    "bfloat16": {"r": 8, "lora_alpha": 16, "dtype": torch.bfloat16},
    "gate_only": {"r": 4, "lora_alpha": 8, "target_modules": ["gate_proj", "k_proj"], **SOME},
}


@dataclass(frozen=True)
class Loaded:
    """An adapter, the folder of its published copy, its slots, and where the worker has them."""

    adapter: Adapter
    published: Path
    slots: Slots
    place: dict[str, Any]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights(CACHE / "models" / "base", CACHE / "models" / "aligned")


@pytest.fixture(scope="module")
def loaded(
    aligned: Path, projectors: Path, weights: Weights, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Loaded]:
    """Every case loaded by one engine that has one slot.

    "again" is everything once more, read in a step: by then the pool has evicted it, its tenant's folder
    is gone, and it comes from the published copy.
    """
    root = tmp_path_factory.mktemp("slots")
    adapters = {
        name: make_adapter(root / name, weights, aligned, seed, **{"target_modules": list(ALL), **case})
        for seed, (name, case) in enumerate(CASES.items())
    }
    one_slot = {"max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": MAX_RANK}
    policy = {"method": "safe-lora", "select": "all"}
    settings = slots.options(projectors, root / "store", policy, **one_slot, **slots.IN_PROCESS)
    engine = Engine(str(aligned), settings)
    for lora_id, name in enumerate(CASES, start=1):
        copy = shutil.copytree(root / name, root / "tenant" / name)
        engine.add("load", name, lora_id, str(copy))
        engine.add("slots", lora_id, str(root / "slots" / name))
    tenant = str(root / "tenant" / "everything")
    engine.add("remove_folder", tenant)
    engine.add("say", "everything", 1, tenant)
    engine.add("slots", 1, str(root / "slots" / "again"))
    (answers,) = slots.run([engine], root, slots.ONE_PROCESS, seconds=400)
    answered = list(zip(engine.steps, answers, strict=True))
    assert all(answer is True for (step, *_), answer in answered if step == "load")
    places = [answer for (step, *_), answer in answered if step == "slots"]
    adapters["again"] = adapters["everything"]
    return {
        name: Loaded(
            adapter,
            slots.published(root / "store", adapter.folder),
            slots.read(root / "slots" / name),
            place[0],
        )
        for (name, adapter), place in zip(adapters.items(), places, strict=True)
    }


@pytest.mark.parametrize("name", [*CASES, "again"])
def test_slots_hold_the_published_copy(loaded: dict[str, Loaded], name: str) -> None:
    """To the last bit, in all modules, also in those and in the ranks that the adapter does not have."""
    found = loaded[name]
    assert found.place["slot"] == 0, "there is one slot, so it was used before"
    assert slots.from_published(found.slots, found.published) == 0.0
    assert found.place["elsewhere"] == 0.0


@pytest.mark.parametrize("name", [*CASES, "again"])
def test_slots_hold_the_projection_of_the_original(
    loaded: dict[str, Loaded], weights: Weights, name: str
) -> None:
    found = loaded[name]
    worst = slots.from_projection(found.slots, found.adapter, weights)
    assert worst < slots.TOLERANCE[torch.bfloat16]


def test_a_smaller_adapter_leaves_most_of_the_slot_empty(loaded: dict[str, Loaded]) -> None:
    """That the tests above see what an adapter does not cover."""
    full = {module for module, (a, _) in loaded["everything"].slots.items() if a.any()}
    few = {module for module, (a, _) in loaded["few_layers"].slots.items() if a.any()}
    assert len(full) == len(loaded["everything"].adapter.scales) == 210
    assert few == set(loaded["few_layers"].adapter.scales) and len(few) == 9
