"""Published weights are read, not mapped. `test_survival` cuts the file of one that is served."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from vllm.lora import lora_model
from vllm.lora.peft_helper import PEFTHelper

from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.integration.plugin import register
from safelora_vllm.integration.seams.fixes.fix import original
from safelora_vllm.integration.seams.fixes.unmapped import InMemorySafeOpen
from tests.tiny import Draft

pytestmark = pytest.mark.server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Draft().write(tmp_path / "adapter") / WEIGHTS


def test_the_same_tensors_as_from_a_map(file: Path) -> None:
    with safe_open(file, framework="pt") as mapped, InMemorySafeOpen(str(file), framework="pt") as read:
        assert set(read.keys()) == set(mapped.keys())
        for name in set(mapped.keys()):
            assert torch.equal(read.get_tensor(name), mapped.get_tensor(name))


def test_they_outlive_their_file(file: Path) -> None:
    with InMemorySafeOpen(str(file), framework="pt") as read:
        tensors = {name: read.get_tensor(name) for name in set(read.keys())}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with file.open("r+b") as writer:
        writer.write(b"\xff" * file.stat().st_size)
    file.write_bytes(b"")
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def after_a_write(file: Path) -> list[tuple[Tensor, Tensor]]:
    """Each matrix of an adapter that vLLM has loaded, before and after its file is written to."""
    config = PEFTHelper.from_local_dir(str(file.parent), max_position_embeddings=None)
    with safe_open(file, framework="pt") as opened:
        modules = {name.split(".")[-3] for name in set(opened.keys())}
    loaded = lora_model.LoRAModel.from_local_checkpoint(str(file.parent), modules, config, device="cpu")
    tensors = [tensor for layer in loaded.loras.values() for tensor in (layer.lora_a, layer.lora_b)]
    before = [tensor.clone() for tensor in tensors]
    with file.open("r+b") as writer:
        writer.seek(-8, 2)
        writer.write(b"\x3f" * 8)
    return list(zip(before, tensors, strict=True))


def test_what_vllm_has_loaded_outlives_its_file(file: Path) -> None:
    register()
    assert all(torch.equal(before, after) for before, after in after_a_write(file))


def test_vllm_still_maps_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when vLLM reads weights into memory of their own: then the fix can go."""
    monkeypatch.setattr(lora_model, "safetensors", original(lora_model, "safetensors"))
    assert not all(torch.equal(before, after) for before, after in after_a_write(file))


def test_reading_again_and_again_keeps_nothing(file: Path) -> None:
    def read() -> int:
        with InMemorySafeOpen(str(file), framework="pt") as opened:
            return len([opened.get_tensor(name) for name in set(opened.keys())])

    tensors = read()
    tracemalloc.start()
    try:
        read()
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            read()
        gc.collect()
        kept = (tracemalloc.get_traced_memory()[0] - before) / 50
    finally:
        tracemalloc.stop()
    assert kept < 8 * tensors  # a map of safetensors 0.8 keeps 56 bytes per tensor
