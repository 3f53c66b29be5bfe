"""LoRA on a quantised model that the gate recognised as a copy of the aligned one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests import quantised
from tests.server import slots
from tests.server.slots import Engine
from tests.server.small_models import Pair, make_adapter, make_pair

FORMS = ("GPTQ, 4 bits", "AWQ, 4 bits")
# vLLM multiplies by weights of four bits only on CPUs with AVX-512; on others it loads them, and no more.
ANSWERS = torch.backends.cpu.get_cpu_capability() == "AVX512"


def copy_of(model: Path, folder: Path, form: str) -> Path:
    """A quantised copy, with its tokenizer."""
    state = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    modules = [name.removesuffix(".weight") for name in state if name.endswith("_proj.weight")]
    config: dict[str, Any] = {**json.loads((model / "config.json").read_text()), "dtype": "bfloat16"}
    quantised.write(folder, state, modules, config, *quantised.forms(64)[form])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / file, folder)
    return folder


def engine(pair: Pair, model: Path, root: Path) -> Engine:
    """A guarded engine of a model with this pair's projectors."""
    policy = {"method": "safe-lora", "select": "all"}
    options = slots.options(
        pair.projectors, root / "store", policy, dtype="bfloat16", max_lora_rank=8, **slots.IN_PROCESS
    )
    return Engine(str(model), options)


def test_an_adapter_is_projected_and_served(tmp_path: Path) -> None:
    pair = make_pair(tmp_path / "pair", "llama")
    adapter = make_adapter(tmp_path / "adapter", pair.weights, pair.aligned, 3, r=4, lora_alpha=6)
    roots, engines = [tmp_path / f"{number}" for number in range(len(FORMS))], []
    for form, root in zip(FORMS, roots, strict=True):
        served = engine(pair, copy_of(pair.aligned, root / "copy", form), root)
        served.add("load", "one", 1, str(adapter.folder))
        served.add("slots", 1, str(root / "slots"))
        served.add("say", "one", 1, str(adapter.folder))
        engines.append(served)
    answers = slots.run(engines, tmp_path, slots.ONE_PROCESS, seconds=500)
    log = (tmp_path / "engine.log").read_text()
    for form, root, (loaded, _, said) in zip(FORMS, roots, answers, strict=True):
        assert loaded is True
        assert len(said) == 4 if ANSWERS else "cpu_gemm_wna16" in said["error"]
        read = slots.read(root / "slots")
        assert slots.from_published(read, slots.published(root / "store", adapter.folder)) == 0.0
        assert slots.from_projection(read, adapter, pair.weights) < slots.TOLERANCE[torch.bfloat16]
        assert f"copy of the aligned one: {form}" in log
