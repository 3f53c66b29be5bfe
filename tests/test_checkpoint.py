"""Reading checkpoints: damaged files, sharding, identity."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from safelora_vllm.errors import CheckpointError
from safelora_vllm.projectors.checkpoint import Checkpoint, locate_model
from safelora_vllm.projectors.weight_files import read_header
from tests.tiny import Pair, base_weights, safetensors_bytes, write_checkpoint

_TWO = {  # eight bytes each, side by side
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
}


def moved(name: str, start: int, end: int, **changes: Any) -> dict[str, Any]:
    """`_TWO` with one tensor's line changed."""
    return {**_TWO, name: {**_TWO[name], "data_offsets": [start, end], **changes}}


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    data = struct.pack("<4f", 1, 2, 3, 4)
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(_TWO, data))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.read("b").tolist() == [3, 4] and checkpoint.config == {}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\0\0",
        safetensors_bytes(_TWO, bytes(16), length=10**9),
        safetensors_bytes(_TWO, bytes(16), length=2**63),
        safetensors_bytes(_TWO, bytes(15)),
        safetensors_bytes(b'{"a": ', bytes(16)),
        safetensors_bytes(b"[]", bytes(16)),
        safetensors_bytes(b"[" * 50_000, bytes(16)),
        safetensors_bytes(moved("b", 8, 24), bytes(16)),
        safetensors_bytes(moved("b", -8, 0), bytes(16)),
        safetensors_bytes(moved("b", 16, 8), bytes(16)),
        safetensors_bytes(moved("b", 4, 12), bytes(16)),
        safetensors_bytes(moved("b", 8, 16, shape=[3]), bytes(16)),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    ],
    ids=[
        "empty", "three-bytes", "header-too-long", "header-beyond-signed", "data-cut", "header-cut",
        "header-list", "header-nested", "outside", "negative", "backwards", "overlapping",
        "wrong-bytes-for-shape", "no-offsets",
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        read_header(file)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_bytes(_TWO, bytes(16)))
    checkpoint = Checkpoint(tmp_path)
    file.write_bytes(safetensors_bytes(_TWO, bytes(12)))
    with pytest.raises(CheckpointError, match="ends inside b"):
        checkpoint.read("b")


def test_a_quantised_tensor_and_an_absent_one(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "m", {"a": torch.zeros(4, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=r"a in .* is I8; .* unquantised"):
        checkpoint.read("a")
    with pytest.raises(CheckpointError, match="has no tensor b"):
        checkpoint.read("b")


def test_no_weights_and_missing_shards(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors; expected"):
        Checkpoint(tmp_path / "empty")
    sharded = write_checkpoint(tmp_path / "sharded", pair.before, shards=3)
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model-00002-of-00003\.safetensors"):
        Checkpoint(sharded)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(index: str, pair: Pair, tmp_path: Path) -> None:
    sharded = write_checkpoint(tmp_path / "sharded", pair.before, shards=2)
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="index"):
        Checkpoint(sharded)


def test_a_tensor_in_two_shards(pair: Pair, tmp_path: Path) -> None:
    sharded = write_checkpoint(tmp_path / "sharded", pair.before, shards=2)
    first, second = sorted(sharded.glob("model-*"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="is in two files"):
        Checkpoint(sharded)


def test_a_config_that_is_not_json(pair: Pair, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", pair.before)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        _ = Checkpoint(folder).config


def test_no_such_folder_is_not_looked_up_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_args, **_options: pytest.fail("asked"))
    for path in (tmp_path / "none", "./none", "a/b/c"):
        with pytest.raises(CheckpointError, match="expected a model folder or a hub id"):
            locate_model(path)


def test_hub_ids_and_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert allow_patterns == ["*.safetensors", "*.json"]
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate_model("org/name") == locate_model("org/name@v1") == tmp_path
    assert asked == [("org/name", None), ("org/name", "v1")]


def test_sharding_changes_neither_fingerprint_nor_digest(pair: Pair, tmp_path: Path) -> None:
    single = Checkpoint(pair.base)
    for shards in (2, 5):
        sharded = Checkpoint(write_checkpoint(tmp_path / str(shards), pair.before, shards=shards))
        assert sharded.fingerprint() == single.fingerprint()
        assert sharded.digest() == single.digest()
        for name in single.tensors:
            assert torch.equal(sharded.read(name), single.read(name))


def test_what_stands_behind_a_small_tensor_is_not_in_its_sample(tmp_path: Path) -> None:
    found = set()
    for places in ({"a": (0, 8), "b": (8, 16)}, {"b": (0, 8), "a": (8, 16)}):
        tensors = {name: {**_TWO["a"], "data_offsets": place} for name, place in places.items()}
        values = {"a": struct.pack("<2f", 1, 2), "b": struct.pack("<2f", 3, 4)}
        data = b"".join(values[name] for name in places)
        (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors, data))
        found.add(Checkpoint(tmp_path).fingerprint())
    assert len(found) == 1


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_another_tensor_changes_fingerprint_and_digest(change: str, pair: Pair, tmp_path: Path) -> None:
    state = base_weights()
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "value":
        state[name] = state[name] + 1e-3
    elif change == "name":
        state["model.layers.2.mlp.up_proj.weight"] = state.pop(name)
    elif change == "dtype":
        state[name] = state[name].bfloat16()
    else:
        state[name] = state[name].T.contiguous()
    changed, original = Checkpoint(write_checkpoint(tmp_path / "m", state)), Checkpoint(pair.base)
    assert changed.fingerprint() != original.fingerprint()
    assert changed.digest() != original.digest()


@pytest.mark.parametrize("size", [1, 255, 256, 257, 300, 2048, 100_003])
def test_the_fingerprint_samples_eight_blocks_from_the_first_byte_to_the_last(
    size: int, tmp_path: Path
) -> None:
    """Among other tensors: what is sampled lies in this one alone."""
    rest = {"dtype": "U8", "shape": [999], "data_offsets": [size, size + 999]}
    tensors = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}, "b": rest}
    starts = {max(size - 256, 0) * block // 7 for block in range(8)}
    sampled = {place for start in starts for place in range(start, min(start + 256, size))}
    edges = {place + step for place in (*starts, *(start + 256 for start in starts)) for step in (-1, 0)}

    def fingerprint(changed: int | None) -> str:
        data = bytearray(size + 999)
        if changed is not None:
            data[changed] = 1
        (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(tensors, bytes(data)))
        return Checkpoint(tmp_path).fingerprint()

    plain = fingerprint(None)
    for place in sorted(edge for edge in edges | {0, size - 1} if 0 <= edge < size):
        assert (fingerprint(place) != plain) is (place in sampled), place


def test_the_digest_sees_a_bit_that_the_fingerprint_does_not_sample(pair: Pair, tmp_path: Path) -> None:
    state = base_weights()
    weight = state["model.layers.0.mlp.up_proj.weight"]
    flat = weight.flatten()
    flat[150] += 1.0  # byte 600: behind the first sample of 256 bytes, before the next
    state["model.layers.0.mlp.up_proj.weight"] = flat.reshape(weight.shape)
    changed, original = Checkpoint(write_checkpoint(tmp_path / "m", state)), Checkpoint(pair.base)
    assert changed.digest() != original.digest()
    assert changed.fingerprint() == original.fingerprint()  # as its docstring says


def test_an_index_cannot_name_a_file_outside_of_its_folder(pair: Pair, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", pair.before)
    text = json.dumps({"weight_map": {"a": "../model.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(text)
    assert {info.file.parent for info in Checkpoint(folder).tensors.values()} == {folder}
