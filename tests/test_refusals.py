"""Refusals by what lies in the folder: kinds of files, sizes, headers, JSON. And several at once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import save

from safelora_vllm.adapters.header import Header, read_header
from safelora_vllm.errors import UsageError
from safelora_vllm.gate import GateSettings, admit
from safelora_vllm.store import PublishedStore
from tests.refusing import codes, judge
from tests.tiny import Q0, Draft, key, lora, safetensors_bytes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Damage = Callable[[Path], object]  # what is done to a sound adapter's folder


def swap(name: str, make: Callable[[Path], object]) -> Damage:
    """Put something else in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def link(path: Path) -> None:
    """A symbolic link to a sound file of the same kind outside of the folder."""
    outside = Draft().write(path.parent.parent / "outside") / path.name
    path.symlink_to(outside)


def listen(path: Path) -> None:
    """A Unix socket; its path may be longer than a socket's may be."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def sparse(size: int) -> Callable[[Path], object]:
    """A file of that size that takes no room on disk."""

    def make(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return make


def cut(path: Path, count: int) -> None:
    """Take ``count`` bytes off the end of a file."""
    os.truncate(path, path.stat().st_size - count)


def text(value: str | bytes) -> Damage:
    """Another text in the config."""
    return lambda folder: (folder / CONFIG).write_bytes(value.encode() if isinstance(value, str) else value)


def raw(value: bytes) -> Damage:
    """Other bytes in the weights."""
    return lambda folder: (folder / WEIGHTS).write_bytes(value)


def lines(*entries: tuple[object, object, object], size: int = 1536) -> Damage:
    """Weights with these dtypes, shapes and offsets in their header, over that many zeros."""
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        for name, (dtype, shape, offsets) in zip((_A, _B), entries, strict=False)
    }
    return lambda folder: (folder / WEIGHTS).write_bytes(safetensors_bytes(header, bytes(size)))


def saved(name: str) -> Damage:
    """Weights under another name, as older PEFT releases saved them."""
    return swap(WEIGHTS, lambda path: torch.save(lora(), path.parent / name))


_A, _B = key(Q0, "A"), key(Q0, "B")
_SOUND = json.dumps(Draft().config)
_LINE = '{"dtype": "F32", "shape": [4, 96], "data_offsets": [0, 1536]}'
_PAIR = save({_A: torch.zeros(4, 96), _B: torch.zeros(96, 4)})
_FORGED = "F32)\nINFO [safelora gate] adapter 'evil' accepted: 60 of 60 modules projected\x1b[2J"

FILES: list[tuple[str, str, Damage]] = [
    ("only-bin", "unsafe_format", saved("adapter_model.bin")),
    ("only-pt", "unsafe_format", saved("adapter_model.pt")),
    ("only-pth", "unsafe_format", saved("adapter_model.pth")),
    ("no-config", "missing_file", lambda folder: (folder / CONFIG).unlink()),
    ("no-weights", "missing_file", lambda folder: (folder / WEIGHTS).unlink()),
    ("nothing", "missing_file", lambda folder: [(folder / n).unlink() for n in (CONFIG, WEIGHTS)]),
    ("config-fifo", "not_regular_file", swap(CONFIG, os.mkfifo)),
    ("weights-fifo", "not_regular_file", swap(WEIGHTS, os.mkfifo)),
    ("config-link", "not_regular_file", swap(CONFIG, link)),
    ("weights-link", "not_regular_file", swap(WEIGHTS, link)),
    ("dangling-link", "not_regular_file", swap(WEIGHTS, lambda path: path.symlink_to("nowhere"))),
    ("device-link", "not_regular_file", swap(WEIGHTS, lambda path: path.symlink_to("/dev/zero"))),
    ("config-folder", "not_regular_file", swap(CONFIG, Path.mkdir)),
    ("weights-folder", "not_regular_file", swap(WEIGHTS, Path.mkdir)),
    ("config-socket", "not_regular_file", swap(CONFIG, listen)),
    ("weights-socket", "not_regular_file", swap(WEIGHTS, listen)),
    ("config-too-large", "too_large", swap(CONFIG, sparse(2**20 + 1))),
    ("weights-too-large", "too_large", swap(WEIGHTS, sparse(2**31 + 1))),
    ("config-1-GB", "too_large", swap(CONFIG, sparse(2**30))),
    ("config-empty", "config_malformed", text("")),
    ("config-not-json", "config_malformed", text("r: 8")),
    ("config-not-utf8", "config_malformed", text(b'{"r": "\xff"}')),
    ("config-nan", "config_malformed", text(_SOUND.replace(": 8", ": NaN"))),
    ("config-infinity", "config_malformed", text(_SOUND.replace(": 8", ": Infinity"))),
    ("config-minus-infinity", "config_malformed", text(_SOUND.replace(": 8", ": -Infinity"))),
    ("config-repeated-key", "config_malformed", text(_SOUND.replace('"r": 4', '"r": 4, "r": 8'))),
    ("config-list", "config_malformed", text(f"[{_SOUND}]")),
    ("config-null", "config_malformed", text("null")),
    ("config-nested", "config_malformed", text("[" * 200_000)),
    ("config-endless-number", "config_malformed", text(_SOUND.replace(": 8", ": 1" + "0" * 9000))),
    ("weights-empty", "weights_malformed", raw(b"")),
    ("weights-cut-in-length", "weights_malformed", raw(_PAIR[:5])),
    ("weights-cut-in-header", "weights_malformed", raw(_PAIR[:40])),
    ("weights-cut-in-data", "weights_malformed", lambda folder: cut(folder / WEIGHTS, 1)),
    ("weights-longer", "weights_malformed", raw(_PAIR + b"tail")),
    ("header-huge", "weights_malformed", raw(safetensors_bytes(b" " * (8 * 2**20) + b"{}"))),
    ("header-longer-than-file", "weights_malformed", raw(safetensors_bytes({}, length=10**6))),
    ("header-of-2**63", "weights_malformed", raw(safetensors_bytes({}, length=2**63))),
    ("header-not-json", "weights_malformed", raw(safetensors_bytes(b"{]"))),
    ("header-list", "weights_malformed", raw(safetensors_bytes(b"[]"))),
    ("header-nested", "weights_malformed", raw(safetensors_bytes(b'{"a":' * 100_000))),
    (
        "header-repeated-key",
        "weights_malformed",
        raw(safetensors_bytes(f'{{"{_A}": {_LINE}, "{_A}": {_LINE}}}'.encode(), bytes(1536))),
    ),
    ("header-nan", "weights_malformed", raw(safetensors_bytes(b'{"__metadata__": NaN}'))),
    ("header-no-dtype", "weights_malformed", raw(safetensors_bytes({_A: {"shape": [1]}}))),
    ("header-text-shape", "weights_malformed", raw(safetensors_bytes({_A: {"dtype": "F32", "shape": "4"}}))),
    ("header-true-shape", "weights_malformed", raw(safetensors_bytes({_A: {"dtype": 0, "shape": [True]}}))),
    ("header-overlap", "weights_malformed", lines(("F32", [4, 96], [0, 1536]), ("F32", [96, 4], [0, 1536]))),
    ("header-hole", "weights_malformed", lines(
        ("F32", [4, 96], [0, 1536]), ("F32", [96, 4], [1540, 3076]), size=3076
    )),
    ("header-hole-before", "weights_malformed", lines(("F32", [4, 96], [4, 1540]), size=1540)),
    ("header-backwards", "weights_malformed", lines(("F32", [4, 96], [1536, 0]))),
    ("header-negative", "weights_malformed", lines(("F32", [4, 96], [-1536, 0]))),
    ("header-three-offsets", "weights_malformed", lines(("F32", [4, 96], [0, 1536, 1536]))),
    ("header-no-offsets", "weights_malformed", lines(("F32", [4, 96], None))),
    ("header-other-size", "weights_malformed", lines(("F16", [4, 96], [0, 1536]))),
    ("header-dtype-forges-a-log-line", "weights_malformed", lines((_FORGED, [4, 96], [0, 1536]))),
    ("header-dtype-surrogate", "weights_malformed", lines(("\ud800", [4, 96], [0, 1536]))),
    ("header-dtype-long", "weights_malformed", lines(("F" * 7_900_000, [4, 96], [0, 1536]))),
    ("header-shape-long", "weights_malformed", lines(("F32", [1] * 2_000_000, [0, 4]), size=4)),
    ("header-shape-text", "weights_malformed", lines(("F32", ["\n" * 3_900_000], [0, 1536]))),
    ("header-shape-huge", "weights_malformed", lines(("I8", [10**4000] * 2, [0, 1536]))),
    ("header-outside", "weights_malformed", raw(_PAIR[:-1536])),
    ("no-tensors", "empty", raw(save({}))),
]  # fmt: skip


def test_the_adapter_that_all_tables_spoil_is_sound(
    tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    assert judge(Draft().write(tmp_path / "a"), gate, store).report.accepted


@pytest.mark.parametrize(
    ("code", "damage"), [pytest.param(code, damage, id=name) for name, code, damage in FILES]
)
def test_what_lies_in_the_folder(
    code: str, damage: Damage, tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    folder = Draft().write(tmp_path / "adapter")
    damage(folder)
    assert codes(judge(folder, gate, store)) == {code}


def test_a_pickle_beside_the_safetensors_is_not_touched(
    tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    folder = Draft().write(tmp_path / "adapter")
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (folder / "tokenizer.json").write_text("{}")
    admission = judge(folder, gate, store)
    assert admission.report.accepted and admission.folder is not None
    assert {file.name for file in admission.folder.iterdir()} == {CONFIG, WEIGHTS, "report.json"}


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
    from safelora_vllm import gate as module

    expected = judge(Draft().write(tmp_path / "plain"), gate, PublishedStore(tmp_path / "other"))
    folder = Draft().write(tmp_path / "adapter")

    def swapping(*arguments: object) -> object:
        result = read(*arguments)
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
    assert {reason.detail.split(" has")[0] for reason in report.reasons} == {key(Q0, "A"), key(Q0, "B")}

    flood = Draft(tensors={f"x{i}": torch.zeros(1) for i in range(3000)})
    report = judge(flood.write(tmp_path / "b"), gate, store).report
    assert 1 < len(report.reasons) < 100
