"""What a reader of adapters is told, and which bytes it takes: folders and archives, to the byte."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import socket
from pathlib import Path

import pytest

from safelora_vllm.adapters import read as module
from safelora_vllm.adapters.read import Limits, content_digest, read_adapter
from safelora_vllm.errors import AdapterNotFound, AdapterRefused
from tests.packing import C1, CONFIG, W1, WEIGHTS, C, W, tar, zipped

BESIDE = 64 * 1024**2
HEAD = int.from_bytes(W[:8], "little")
LIMITS = Limits(config_bytes=len(C), weights_bytes=len(W), header_bytes=HEAD)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound adapter."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).write_bytes(C)
    (folder / WEIGHTS).write_bytes(W)
    return folder


def refused(path: Path, limits: Limits = LIMITS) -> list[str]:
    """Codes and sentences."""
    with pytest.raises(AdapterRefused) as caught:
        read_adapter(path, limits)
    return [f"{reason.code}: {reason.message}" for reason in caught.value.reasons]


@pytest.mark.parametrize("packed", [None, tar, zipped], ids=["folder", "tar", "zip"])
def test_files_of_the_largest_size_are_read_as_they_are(packed: object, folder: Path) -> None:
    if callable(packed):
        folder = folder.parent / "upload"
        folder.write_bytes(packed(C1, W1))
    raw = read_adapter(str(folder), LIMITS)
    assert raw.files == {CONFIG: C, WEIGHTS: W}
    assert raw.config["r"] == 4 and {name[-13:-7] for name in raw.header} == {"lora_A", "lora_B"}
    sides = hashlib.sha256(C).digest() + hashlib.sha256(W).digest()
    assert raw.digest == content_digest(C, W) == hashlib.sha256(sides).hexdigest()
    text = (
        "over the {:,} bytes allowed" if callable(packed) else "larger than the {:,} bytes that are allowed"
    )
    for field, name, size in (("config_bytes", CONFIG, len(C)), ("weights_bytes", WEIGHTS, len(W))):
        small = dataclasses.replace(LIMITS, **{field: size - 1})
        (found,) = refused(folder, small)
        said = f"too_large: {name} is {text.format(size - 1)}"
        hint = (
            ". Was an embedding or a head saved too (modules_to_save, save_embedding_layers)? If not, a "
            "server's --max-lora-rank and --max-adapter-bytes set the limit"
        )
        assert found == said + hint * (name == WEIGHTS and not callable(packed))
    (found,) = refused(folder, dataclasses.replace(LIMITS, header_bytes=HEAD - 1))
    assert found.startswith("weights_malformed: ") and f"over the {HEAD - 1} allowed" in found


def test_the_limits_of_a_release() -> None:
    assert Limits() == Limits(2**20, 2**31, 2**23, 512)


def test_a_path_without_an_adapter(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for path in (tmp_path / "none", tmp_path / "link", folder / CONFIG, folder / WEIGHTS, "a\0b", "x" * 5000):
        with pytest.raises(AdapterNotFound) as caught:
            read_adapter(path, LIMITS)
        assert str(caught.value) == (
            f"there is no adapter folder {str(path)!r:.300}; give a folder that PEFT saved, or a .tar or "
            ".zip of one"
        )


def test_an_archive_that_goes_before_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gone.tar"
    monkeypatch.setattr(Path, "exists", lambda _: True)
    with pytest.raises(AdapterNotFound, match=r"gone\.tar"):
        read_adapter(path, LIMITS)


PICKLE = f"is a pickle; save the adapter as {WEIGHTS}"


@pytest.mark.parametrize("packed", [None, tar], ids=["folder", "archive"])
@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ([CONFIG], [f"missing_file: the adapter has no {WEIGHTS}"]),
        ([WEIGHTS], [f"missing_file: the adapter has no {CONFIG}"]),
        ([CONFIG, "adapter_model.bin"], [f"unsafe_format: adapter_model.bin {PICKLE}"]),
        ([CONFIG, "adapter_model.pt"], [f"unsafe_format: adapter_model.pt {PICKLE}"]),
        ([CONFIG, "adapter_model.pth"], [f"unsafe_format: adapter_model.pth {PICKLE}"]),
        ([CONFIG, "adapter_model.pth", "adapter_model.bin"], [f"unsafe_format: adapter_model.bin {PICKLE}"]),
        ([WEIGHTS, "adapter_model.bin"], [f"missing_file: the adapter has no {CONFIG}"]),
    ],
)
def test_files_that_are_missing(
    there: list[str], expected: list[str], packed: object, folder: Path, tmp_path: Path
) -> None:
    data = {name: {CONFIG: C, WEIGHTS: W}.get(name, b"x") for name in there}
    if callable(packed):
        (tmp_path / "upload").write_bytes(packed(*data.items()))
        assert refused(tmp_path / "upload") == expected
        return
    for name in {CONFIG, WEIGHTS} - set(there):
        (folder / name).unlink()
    for name in there:
        (folder / name).write_bytes(data[name])
    assert refused(folder) == expected


def test_an_archive_names_all_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "upload").write_bytes(tar(("README.md", b"x")))
    assert refused(tmp_path / "upload") == [
        f"missing_file: the adapter has no {x}" for x in (CONFIG, WEIGHTS)
    ]


def test_as_much_as_allowed_stands_beside_the_files(tmp_path: Path) -> None:
    path = tmp_path / "upload"
    path.touch()
    allowed = len(C) + len(W) + BESIDE
    os.truncate(path, allowed)  # sparse: only its size counts
    assert refused(path)[0].startswith("archive_malformed: ")
    os.truncate(path, allowed + 1)
    assert refused(path) == [f"too_large: the archive is larger than the {allowed:,} bytes that are allowed"]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["link", "socket", "pipe", "folder", "unreadable"])
def test_only_regular_files_are_opened(
    kind: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / name
    if kind != "unreadable":
        file.rename(folder / "other")
    expected = f"not_regular_file: {name} is not a regular file"
    if kind == "link":
        file.symlink_to("other")
        expected = (
            f"not_regular_file: {name} is a link or a socket; copy the file it leads to, such as with cp -L. "
            "For a folder of the hub's cache: hf download REPOSITORY --local-dir DIR"
        )
    elif kind == "socket":
        monkeypatch.chdir(folder)  # the path of a socket is short
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(name)
        expected = (
            f"not_regular_file: {name} is a link or a socket; copy the file it leads to, such as with cp -L. "
            "For a folder of the hub's cache: hf download REPOSITORY --local-dir DIR"
        )
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        opened = os.open

        def denied(path: str | Path, *arguments: int) -> int:
            if Path(path) == file:
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, *arguments)

        monkeypatch.setattr(os, "open", denied)
        expected = f"unreadable_file: {name} cannot be opened: Permission denied"
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert refused(folder) == [expected]
    assert len(list(Path("/proc/self/fd").iterdir())) == before, "it was left open"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "the archive"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("longer", "unreadable_file: {} changed while it was read; load it again"),
        ("shorter", "unreadable_file: {} changed while it was read; load it again"),
        ("broken", "unreadable_file: {} cannot be read: Input/output error"),
    ],
    ids=["longer", "shorter", "broken"],
)
def test_a_file_that_changes_or_breaks_while_it_is_read(
    name: str, change: str, told: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, size = folder, {CONFIG: len(C), WEIGHTS: len(W)}.get(name, 0)
    if name == "the archive":
        path = tmp_path / "upload"
        path.write_bytes(tar(C1, W1))
        size = path.stat().st_size
    asked = []

    class Changing(io.FileIO):
        def read(self, count: int | None = -1) -> bytes:  # type: ignore[override]
            if count not in (size + 1, None, -1):
                return super().read(count) or b""
            asked.append(count)
            if change == "broken":
                raise OSError(5, "Input/output error")
            data = super().read(count) or b""
            return data + b"x" if change == "longer" else data[:-1]

    fdopen = os.fdopen

    def opened(descriptor: int, mode: str) -> object:
        same = os.fstat(descriptor).st_size == size
        return Changing(descriptor) if same else fdopen(descriptor, mode)

    monkeypatch.setattr(os, "fdopen", opened)
    assert refused(path) == [told.format(name)]
    assert asked == [size + 1], "no more is read of what grows without an end"


def test_weights_of_which_the_beginning_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*arguments: object) -> object:
        beginning, header = read_header(*arguments)  # type: ignore[arg-type]
        return b"x" + beginning[1:], header

    read_header = module.read_header
    monkeypatch.setattr(module, "read_header", other)
    assert refused(folder) == [f"unreadable_file: {WEIGHTS} changed while it was read; load it again"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b'"peft_type"', "is not a JSON object"),
        (b"{", "is not plain JSON: Expecting property name"),
        (b'{"a": NaN}', "is not plain JSON: NaN is not a number"),
        (b'{"a": 1, "a": 2}', "is not plain JSON: a key is there twice"),
        (b"[" * 100_000, "is not plain JSON: maximum recursion depth"),
        (b"\xff\xfe{", "is not plain JSON: "),
        (b" " * 50 + b"<!DOCTYPE html>", "is not plain JSON: it is a web page"),
        (b" " * 51 + b"<!DOCTYPE html>", "is not plain JSON: Expecting value"),
        (b"version https://git-lfs.github.com/spec/v1", "is not plain JSON: it is a Git LFS pointer"),
    ],
    ids=range(11),
)
def test_a_config_that_is_no_json_object(text: bytes, told: str, folder: Path) -> None:
    (folder / CONFIG).write_bytes(text)
    (found,) = refused(folder, Limits())
    assert found.startswith(f"config_malformed: {CONFIG} {told}")
    if told == "is not a JSON object":
        assert found.endswith(told)
