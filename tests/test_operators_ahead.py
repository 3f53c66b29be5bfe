"""Ĉ and V that are not held: fetched one module ahead, once for each use, from files that are still sound."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import safelora_vllm as sl
from safelora_vllm.errors import ProjectorCacheError
from safelora_vllm.methods.reads import parts_read
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.operators_ahead import OperatorsAhead
from safelora_vllm.projectors.placement import place
from tests.test_placement import CPU, READERS, SAFE_LORA, demand
from tests.tiny import Draft


class Source:
    """Reads that are counted, of tensors that hold their key."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.threads: set[int] = set()
        self.failing = ""

    def __call__(self, key: str, buffer: Tensor) -> Tensor:
        self.reads.append(key)
        self.threads.add(threading.get_ident())
        if key == self.failing:
            raise ProjectorCacheError("gone")
        return buffer[:4].view(torch.int32).copy_(torch.tensor([int(key)], dtype=torch.int32))


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def ahead(source: Source) -> OperatorsAhead:
    return OperatorsAhead(16, CPU, source)


def settled(ahead: OperatorsAhead) -> None:
    """All that was asked for has been fetched."""
    for _, future in ahead._fetched:
        future.exception()


def test_the_next_one_is_fetched_while_one_is_used(ahead: OperatorsAhead, source: Source) -> None:
    keys = ["1", "2", "3", "2", "5"]
    with ahead.following(keys):
        settled(ahead)
        assert source.reads == ["1", "2"]
        for place_of, key in enumerate(keys):
            found = ahead.take(key, CPU)
            assert found is not None
            settled(ahead)
            assert found.item() == int(key), "its buffer is used by another one"
            assert source.reads == keys[: max(2, place_of + 2)]
        assert ahead.take("6", CPU) is None
    assert source.threads and threading.get_ident() not in source.threads
    with ahead.following(["7"]):
        again = ahead.take("7", CPU)
        assert again is not None and again.item() == 7


def test_what_is_not_next_is_not_fetched(ahead: OperatorsAhead) -> None:
    assert ahead.take("1", CPU) is None
    with ahead.following(["1", "2"]):
        assert ahead.take("2", CPU) is None and ahead.take("1", torch.device("meta")) is None
        assert ahead.take("1", CPU) is not None and ahead.take("2", CPU) is not None
    with ahead.following([]):
        assert ahead.take("1", CPU) is None
    assert ahead.take("1", CPU) is None


def test_another_thread_goes_without(ahead: OperatorsAhead) -> None:
    found: list[Any] = []

    def other() -> None:
        with ahead.following(["1"]):
            found.append(ahead.take("1", CPU))

    with ahead.following(["1"]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert found == [None] and ahead.take("1", CPU) is not None


def test_an_error_is_raised_where_the_tensor_is_taken(ahead: OperatorsAhead, source: Source) -> None:
    source.failing = "2"
    with pytest.raises(ProjectorCacheError, match="gone"), ahead.following(["1", "2", "3"]):
        assert ahead.take("1", CPU) is not None
        ahead.take("2", CPU)
    source.failing = ""
    with ahead.following(["2"]):
        assert ahead.take("2", CPU) is not None


def test_each_operator_that_is_not_held_is_read_once_for_each_use(
    cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them ahead, by the other thread, and none in the way of the one that judges."""
    adapter = Draft().write(tmp_path / "adapter")
    for policy, times in ((SAFE_LORA, 1), (READERS[2], 2)):
        needed, opened = demand(cache, policy), ProjectorCache(cache.folder)
        placement = place(needed, needed.least + 30_000)
        opened.load(CPU, placement, **dataclasses.asdict(parts_read(policy, cache.thin)))
        reads: list[str] = []
        inner = opened._shards.read_into

        def read_into(
            buffer: Tensor, key: str, shard: str, inner: Any = inner, reads: list[str] = reads
        ) -> Tensor:
            reads.append(key.rpartition(".")[0])
            found: Tensor = inner(buffer, key, shard)
            return found

        monkeypatch.setattr(opened._shards, "read_into", read_into)
        monkeypatch.setattr(opened._shards, "read", lambda *_: pytest.fail("not fetched ahead"))
        assert sl.inspect_adapter(adapter, opened, policy).accepted
        spilled = set(opened.modules) - placement.on_device
        assert placement.on_device and sorted(reads) == sorted([*spilled] * times)


@pytest.fixture
def spilled(cache: ProjectorCache, tmp_path: Path) -> tuple[ProjectorCache, Path]:
    """A cache of one's own with the smallest budget, and a shard with Ĉ."""
    opened = ProjectorCache(shutil.copytree(cache.folder, tmp_path / "cache"))
    needed = demand(opened, SAFE_LORA)
    opened.load(CPU, place(needed, needed.least), **dataclasses.asdict(parts_read(SAFE_LORA, cache.thin)))
    return opened, opened.folder / next(iter(opened.modules.values())).shard


@pytest.mark.parametrize("damage", ["byte", "short", "gone", "empty"])
def test_a_shard_that_is_damaged_while_serving_is_noticed_ahead_too(
    damage: str, spilled: tuple[ProjectorCache, Path], tmp_path: Path
) -> None:
    (cache, shard), adapter = spilled, Draft().write(tmp_path / "adapter")
    before = sl.inspect_adapter(adapter, cache, SAFE_LORA)
    intact = shard.read_bytes()
    match damage:
        case "byte":
            shard.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        case "gone":
            shard.unlink()
        case _:
            shard.write_bytes(intact[:100] if damage == "short" else b"")
    with pytest.raises(ProjectorCacheError, match=f"shard {shard.name} .* cannot be used"):
        sl.inspect_adapter(adapter, cache, SAFE_LORA)
    shard.write_bytes(intact)
    assert sl.inspect_adapter(adapter, cache, SAFE_LORA) == before


def test_a_file_that_ends_early_is_noticed(cache: ProjectorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was cut after it was compared."""
    opened = ProjectorCache(cache.folder)
    name, entry = next(iter(opened.modules.items()))
    monkeypatch.setattr("os.preadv", lambda *_: 0)
    key = f"{name}.{'projector' if entry.form == 'dense' else 'delta'}"
    with pytest.raises(ProjectorCacheError, match="it ends before its tensors do"):
        opened._shards.read_into(torch.empty(2**20, dtype=torch.uint8), key, entry.shard)


def test_short_reads_are_continued(cache: ProjectorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, inner = ProjectorCache(cache.folder), os.preadv
    name, entry = next(iter(opened.modules.items()))
    monkeypatch.setattr("os.preadv", lambda fd, rooms, at: inner(fd, [rooms[0][:1000]], at))
    key = f"{name}.{'projector' if entry.form == 'dense' else 'delta'}"
    found = opened._shards.read_into(torch.empty(2**20, dtype=torch.uint8), key, entry.shard)
    assert torch.equal(found, opened._shards.read(key, entry.shard)) and found.nbytes > 1000
