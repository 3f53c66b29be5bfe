"""What lies in the folder: kinds of files, sizes, headers, JSON; and what becomes of it after vetting."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save, save_file

from tests.corpus.case import Damage, Hostile, damaged
from tests.corpus.target import Target, deltas, sound
from tests.tiny import Q0, key, safetensors_bytes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_A, _B = key(Q0, "A"), key(Q0, "B")
_LINE = '{"dtype": "F32", "shape": [4, 96], "data_offsets": [0, 1536]}'
_FORGED = "F32)\nINFO [safelora gate] adapter 'evil' accepted: 60 of 60 modules projected\x1b[2J"
_PAIR = save({_A: torch.zeros(4, 96), _B: torch.zeros(96, 4)})


def swap(name: str, make: Callable[[Path], object]) -> Damage:
    """Put something else in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def link_out(name: str) -> Damage:
    """Move a sound file out of the folder and leave a symbolic link to it."""

    def damage(folder: Path) -> None:
        outside = folder.with_name(f"{folder.name}-outside")
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return damage


def listen(path: Path) -> None:
    """A Unix socket; its path may be longer than a socket's may be."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def sparse(size: int, start: bytes = b"") -> Callable[[Path], object]:
    """A file of that size that takes next to no room on disk."""

    def make(path: Path) -> None:
        path.write_bytes(start)
        os.truncate(path, size)

    return make


def cut(path: Path, count: int) -> None:
    """Take ``count`` bytes off the end of a file."""
    os.truncate(path, path.stat().st_size - count)


def text(value: str | bytes) -> Damage:
    """Another text in the config."""
    return lambda folder: (folder / CONFIG).write_bytes(value.encode() if isinstance(value, str) else value)


def edit(old: str, new: str) -> Damage:
    """The config's own text with something replaced that JSON writers do not write."""

    def damage(folder: Path) -> None:
        before = (folder / CONFIG).read_text()
        assert old in before
        (folder / CONFIG).write_text(before.replace(old, new))

    return damage


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

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save(tensors, folder / name)

    return damage


def wide(count: int) -> bytes:
    """A header of one pair whose A alone has ``count`` columns."""
    size = 16 * count
    return safetensors_bytes({
        _A: {"dtype": "F32", "shape": [4, count], "data_offsets": [0, size]},
        _B: {"dtype": "F32", "shape": [96, 4], "data_offsets": [size, size + 1536]},
    })  # fmt: skip


_WIDE = wide(2**21)  # 32 MiB

FOLDERS: list[tuple[str, str, Damage]] = [
    ("only-bin", "unsafe_format", saved("adapter_model.bin")),
    ("only-pt", "unsafe_format", saved("adapter_model.pt")),
    ("only-pth", "unsafe_format", saved("adapter_model.pth")),
    ("no-config", "missing_file", lambda folder: (folder / CONFIG).unlink()),
    ("no-weights", "missing_file", lambda folder: (folder / WEIGHTS).unlink()),
    ("nothing", "missing_file", lambda folder: [(folder / n).unlink() for n in (CONFIG, WEIGHTS)]),
    ("config-fifo", "not_regular_file", swap(CONFIG, os.mkfifo)),
    ("weights-fifo", "not_regular_file", swap(WEIGHTS, os.mkfifo)),
    ("config-link", "not_regular_file", link_out(CONFIG)),
    ("weights-link", "not_regular_file", link_out(WEIGHTS)),
    ("dangling-link", "not_regular_file", swap(WEIGHTS, lambda path: path.symlink_to("nowhere"))),
    # Not of the config: an unguarded server would read zeros until the machine has no memory left.
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
    ("config-nan", "config_malformed", edit(": 8", ": NaN")),
    ("config-infinity", "config_malformed", edit(": 8", ": Infinity")),
    ("config-minus-infinity", "config_malformed", edit(": 8", ": -Infinity")),
    ("config-repeated-key", "config_malformed", edit('"r": 4', '"r": 4, "r": 8')),
    ("config-list", "config_malformed", edit("{", "[{")),
    ("config-in-a-list", "config_malformed", text("[{}]")),
    ("config-null", "config_malformed", text("null")),
    ("config-nested", "config_malformed", text("[" * 200_000)),
    ("config-endless-number", "config_malformed", edit(": 8", ": 1" + "0" * 9000)),
    ("weights-empty", "weights_malformed", raw(b"")),
    ("weights-cut-in-length", "weights_malformed", raw(_PAIR[:5])),
    ("weights-cut-in-header", "weights_malformed", raw(_PAIR[:40])),
    ("weights-cut-in-data", "weights_malformed", lambda folder: cut(folder / WEIGHTS, 1)),
    ("weights-longer", "weights_malformed", raw(_PAIR + b"tail")),
    ("weights-sparse-32-MiB", "shape", swap(WEIGHTS, sparse(len(_WIDE) + 2**25 + 1536, _WIDE))),
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


def harmless(name: str, damage: Damage, later: Damage | None = None) -> Hostile:
    """A sound adapter with something beside its files, or whose folder changes after vetting."""

    def write(folder: Path, target: Target) -> Path:
        damage(sound(target).write(folder))
        return folder

    return Hostile(name, "files", write, means=lambda target: deltas(sound(target)), later=later)


def pickle_beside(folder: Path) -> None:
    """What runs a command when it is unpickled, under the name that older releases load."""
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


def fifos_beside(folder: Path) -> None:
    """Pipes under names that a careless copy would open."""
    for name in ("README.md", "tokenizer.json", "adapter_model.pt"):
        os.mkfifo(folder / name)


def other_weights(folder: Path) -> None:
    """Weights of the same shapes, a hundred times as large."""
    tensors = load_file(folder / WEIGHTS)
    save_file({name: 10 * tensor for name, tensor in tensors.items()}, folder / WEIGHTS)


CASES = [damaged(name, "files", codes, damage) for name, codes, damage in FOLDERS] + [
    harmless("pickle-beside", pickle_beside),
    harmless("pipes-beside", fifos_beside),
    harmless("swapped-after-vetting", lambda _: None, other_weights),
    harmless("cut-after-vetting", lambda _: None, lambda folder: cut(folder / WEIGHTS, 1000)),
    harmless("gone-after-vetting", lambda _: None, shutil.rmtree),
    harmless("pipe-after-vetting", lambda _: None, swap(CONFIG, os.mkfifo)),
]
