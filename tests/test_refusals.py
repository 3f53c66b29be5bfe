"""Files that are not there, do not fit or change, and several reasons at once. More: tests/corpus."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import save

from safelora_vllm.errors import UsageError
from safelora_vllm.gate.admit import GateSettings, admit
from safelora_vllm.safetensors_header import Header, read_header
from safelora_vllm.store import PublishedStore
from tests.refusing import codes, judge
from tests.tiny import Q0, Draft, key, lora, safetensors_bytes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_A, _B = key(Q0, "A"), key(Q0, "B")
_PAIR = save({_A: torch.zeros(4, 96), _B: torch.zeros(96, 4)})


def test_the_adapter_that_all_tests_spoil_is_sound(
    tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    assert judge(Draft().write(tmp_path / "a"), gate, store).report.accepted


@pytest.mark.parametrize("path", ["none", "adapter/adapter_config.json", "a\0b", "x" * 10_000, "", "~"])
def test_a_folder_that_is_not_there(
    path: str, tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    Draft().write(tmp_path / "adapter")
    with pytest.raises(UsageError, match="there is no adapter folder"):
        admit(f"{tmp_path}/{path}" if path else f"{tmp_path}/adapter/none/", "tenant", gate, store)


def parted(size: int) -> bytes:
    """The header of one float32 tensor of that many bytes."""
    line = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    return safetensors_bytes({_A: line})


@pytest.mark.parametrize(
    ("head", "size"),
    [(b"", 2**30), (parted(1024), 2**30), (parted(2**30), 2**30), (_PAIR, 2**30)],
    ids=["zeros", "small", "cut", "tail"],
)
def test_weights_that_do_not_fit_their_header_are_not_read(
    head: bytes, size: int, tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    folder = Draft().write(tmp_path / "adapter")
    (folder / WEIGHTS).write_bytes(head)
    os.truncate(folder / WEIGHTS, size)
    tracemalloc.start()
    try:
        assert codes(judge(folder, gate, store)) == {"weights_malformed"}
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20  # of 1 GiB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("change", ["grown", "cut", "swapped"])
def test_a_file_that_changes_while_it_is_read(
    change: str, tmp_path: Path, gate: GateSettings, store: PublishedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Draft().write(tmp_path / "adapter")

    def changing(file: BinaryIO, size: int, limit: int) -> tuple[bytes, Header]:
        beginning, header = read_header(file, size, limit)
        if change == "swapped":
            return beginning.replace(b"layers.0", b"layers.1"), header  # it said something else before
        os.truncate(folder / WEIGHTS, size + (1 if change == "grown" else -1))
        return beginning, header

    monkeypatch.setattr("safelora_vllm.adapters.read.read_header", changing)
    assert codes(judge(folder, gate, store)) == {"unreadable_file"}


def test_a_file_swapped_after_reading_changes_nothing(
    tmp_path: Path, gate: GateSettings, store: PublishedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safelora_vllm.gate import admit as module

    expected = judge(Draft().write(tmp_path / "plain"), gate, PublishedStore(tmp_path / "other"))
    folder = Draft().write(tmp_path / "adapter")

    def swapping(*arguments: object, **options: object) -> object:
        result = read(*arguments, **options)
        shutil.rmtree(folder)
        Draft(tensors=lora(seed=99)).write(folder)
        return result

    read = module.read_adapter
    monkeypatch.setattr(module, "read_adapter", swapping)
    admission = judge(folder, gate, store)
    assert admission.key == expected.key and admission.folder is not None and expected.folder is not None
    assert (admission.folder / WEIGHTS).read_bytes() == (expected.folder / WEIGHTS).read_bytes()


def test_all_problems_of_config_and_header_are_reported_at_once(
    tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    draft = Draft()
    draft.config.update(use_dora=True, bias="all", r=True, modules_to_save=["lm_head"], peft_type="IA3")
    draft.move(Q0, "model.layers.9999.self_attn.q_proj")
    draft.rename(key("model.layers.0.self_attn.v_proj", "A"), "lora_A")
    expected = {"dora", "bias", "config_type", "modules_to_save", "peft_type", "no_projector"}
    assert codes(judge(draft.write(tmp_path / "a"), gate, store)) == expected | {"unknown_tensor", "unpaired"}


def test_all_bad_tensors_are_named_but_a_flood_is_cut(
    tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    draft = Draft()
    for side, value in (("A", float("nan")), ("B", float("inf"))):
        draft.tensors[key(Q0, side)][0, 0] = value
    report = judge(draft.write(tmp_path / "a"), gate, store).report
    (reason,) = report.reasons
    assert reason.message == f"{key(Q0, 'A')}, {key(Q0, 'B')}: NaN or infinite values"

    flood = Draft(tensors={f"x{i}": torch.zeros(1) for i in range(3000)})
    report = judge(flood.write(tmp_path / "b"), gate, store).report
    (reason,) = report.reasons
    assert reason.message.startswith("'x0', 'x1', 'x10' and 2,997 more: not an A or B of plain LoRA")
