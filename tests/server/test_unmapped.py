"""Published weights are read, not mapped. `test_survival` cuts the file of one that is served."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.integration.seams import Unmapped
from tests.tiny import Draft

pytestmark = pytest.mark.server


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Draft().write(tmp_path / "adapter") / WEIGHTS


def test_the_same_tensors_as_from_a_map(file: Path) -> None:
    with safe_open(file, framework="pt") as mapped, Unmapped(str(file), framework="pt") as read:
        assert set(read.keys()) == set(mapped.keys())
        for name in set(mapped.keys()):
            assert torch.equal(read.get_tensor(name), mapped.get_tensor(name))


def test_they_outlive_their_file(file: Path) -> None:
    with Unmapped(str(file), framework="pt") as read:
        tensors = {name: read.get_tensor(name) for name in set(read.keys())}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with file.open("r+b") as writer:
        writer.write(b"\xff" * file.stat().st_size)
    file.write_bytes(b"")
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_reading_again_and_again_keeps_nothing(file: Path) -> None:
    def read() -> int:
        with Unmapped(str(file), framework="pt") as opened:
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
