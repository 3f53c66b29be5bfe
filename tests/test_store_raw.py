"""What tenants uploaded: kept whole, under the digest of its bytes, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.adapters.read import Limits, content_digest, read_adapter
from safelora_vllm.errors import StoreUnavailable
from safelora_vllm.store import RawStore
from safelora_vllm.store import raw as module
from tests.tiny import Draft

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = {CONFIG: b"{}", WEIGHTS: b"weights" * 1000}
# An independent statement of the formula.
DIGEST = hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in FILES.values())).hexdigest()
NO_DIGESTS = ("", "../x", "a" * 63, "A" * 64, "g" * 64, "a" * 64 + "/", "a" * 63 + "\n")


@pytest.fixture
def raw(tmp_path: Path) -> RawStore:
    return RawStore(tmp_path / "deep" / "store")


def content(raw: RawStore) -> dict[str, bytes]:
    """What lies under the test's digest."""
    return {file.name: file.read_bytes() for file in raw.path(DIGEST).iterdir()}


def entries(raw: RawStore) -> set[str]:
    """What lies in the folder of raw content, temporary folders included."""
    folder = raw.root / "raw"
    return {path.name for path in folder.iterdir()} - {".lock"} if folder.exists() else set()


def test_content_lies_under_its_digest(raw: RawStore) -> None:
    assert content_digest(FILES[CONFIG], FILES[WEIGHTS]) == DIGEST
    assert not raw.has(DIGEST) and raw.nbytes(DIGEST) == 0 and raw.all() == []
    assert raw.damaged(DIGEST) == f"{CONFIG} is missing"
    assert not raw.root.exists()  # looking makes nothing
    raw.keep(DIGEST, FILES)
    assert raw.path(DIGEST) == raw.root / "raw" / DIGEST and content(raw) == FILES
    assert raw.has(DIGEST) and raw.damaged(DIGEST) is None and raw.all() == [DIGEST]
    assert raw.nbytes(DIGEST) == 7002
    for path in (raw.root, raw.root / "raw", *raw.root.rglob("raw/**/*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_the_digest_is_the_one_of_reading(raw: RawStore, tmp_path: Path) -> None:
    folder = Draft().write(tmp_path / "adapter")
    digest = read_adapter(folder, Limits()).digest
    raw.keep(digest, {name: (folder / name).read_bytes() for name in FILES})
    assert read_adapter(raw.path(digest), Limits()).digest == digest


def test_keeping_again_leaves_the_copy_but_makes_it_young(raw: RawStore) -> None:
    raw.keep(DIGEST, FILES)
    file = raw.path(DIGEST) / WEIGHTS
    inode = file.stat().st_ino
    os.utime(raw.path(DIGEST), (1000, 1000))
    raw.keep(DIGEST, FILES)
    assert file.stat().st_ino == inode
    assert time.time() - raw.path(DIGEST).stat().st_mtime < 60


def test_a_copy_that_another_one_kept_is_on_the_disk_too(
    raw: RawStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever renamed it may have been killed before the folder above was synced."""
    raw.keep(DIGEST, FILES)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(f"/proc/self/fd/{fd}").readlink().name))
    raw.keep(DIGEST, FILES)
    assert synced == ["raw"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "folder"])
def test_a_damaged_copy_is_told_and_replaced(name: str, damage: str, raw: RawStore) -> None:
    raw.keep(DIGEST, FILES)
    file = raw.path(DIGEST) / name
    if damage == "cut":
        file.write_bytes(FILES[name][:-1])
    elif damage == "flipped":
        file.write_bytes(bytes([FILES[name][0] ^ 1]) + FILES[name][1:])
    else:
        file.unlink()
    if damage == "folder":
        file.mkdir()
    wrong = raw.damaged(DIGEST)
    assert wrong is not None and (name in wrong or "its content has the digest" in wrong)
    assert raw.has(DIGEST) == (damage in ("cut", "flipped"))
    raw.keep(DIGEST, FILES)
    assert content(raw) == FILES and entries(raw) == {DIGEST}


def test_a_file_in_the_place_of_a_folder(raw: RawStore) -> None:
    raw.keep(DIGEST, FILES)
    shutil.rmtree(raw.path(DIGEST))
    raw.path(DIGEST).touch()
    with pytest.raises(StoreUnavailable):  # nothing of ours puts one there: an operator must look
        raw.keep(DIGEST, FILES)
    assert raw.path(DIGEST).is_file() and entries(raw) == {DIGEST}


def test_only_digests_and_their_own_content(raw: RawStore) -> None:
    for bad in NO_DIGESTS:
        calls: Any = (raw.path, raw.has, raw.nbytes, raw.damaged, raw.remove, lambda d: raw.keep(d, FILES))
        for call in calls:
            with pytest.raises(ValueError, match="is no digest"):
                call(bad)
    wrong = ({}, {CONFIG: b"{}"}, {**FILES, "more": b""})
    for files in wrong:
        with pytest.raises(ValueError, match="are not the two files of an adapter"):
            raw.keep(DIGEST, files)
    assert not raw.root.exists()


def test_listing_passes_over_what_is_not_ours(raw: RawStore) -> None:
    raw.keep(DIGEST, FILES)
    for name in (".new-x", "README", "A" * 64):
        (raw.root / "raw" / name).mkdir()
    assert raw.all() == [DIGEST]


def test_removing(raw: RawStore) -> None:
    assert raw.remove(DIGEST)  # it is not there, not even the store
    assert not raw.root.exists()
    raw.keep(DIGEST, FILES)
    assert not raw.remove(DIGEST, min_age_seconds=60) and content(raw) == FILES
    os.utime(raw.path(DIGEST), (1000, 1000))
    assert raw.remove(DIGEST, min_age_seconds=60)
    assert entries(raw) == set() and raw.remove(DIGEST)
    raw.keep(DIGEST, FILES)
    assert raw.remove(DIGEST) and entries(raw) == set()  # however young, unless told otherwise


@pytest.mark.parametrize(("age", "gone"), [(59.5, False), (60.0, True)])
def test_a_copy_of_the_least_age_is_removed(
    age: float, gone: bool, raw: RawStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.keep(DIGEST, FILES)
    os.utime(raw.path(DIGEST), (1000, 1000))
    monkeypatch.setattr(time, "time", lambda: 1000 + age)
    assert raw.remove(DIGEST, min_age_seconds=60.0) == gone and raw.has(DIGEST) != gone


def test_a_copy_that_cannot_be_removed_is_told_with_the_store(
    raw: RawStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.keep(DIGEST, FILES)

    def failing(*_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StoreUnavailable, match=f"adapter store {raw.root} cannot be written .Read-only"):
        raw.remove(DIGEST)
    assert raw.damaged(DIGEST) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdir"])
@pytest.mark.parametrize("state", ["nothing", "damaged"])
def test_a_full_disk_keeps_nothing(
    state: str, call: str, number: int, raw: RawStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    if state == "damaged":
        raw.keep(DIGEST, FILES)
        (raw.path(DIGEST) / CONFIG).write_bytes(b"[]")
    before = entries(raw)

    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(
            StoreUnavailable, match=f"store {raw.root} cannot be written .{os.strerror(number)}"
        ):
            raw.keep(DIGEST, FILES)
    assert entries(raw) == before and raw.damaged(DIGEST) is not None
    raw.keep(DIGEST, FILES)  # and it works when there is room again
    assert content(raw) == FILES


def test_it_is_on_the_disk_before_keep_returns(raw: RawStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files and their folder before the rename, the folder above after it."""
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noting_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def noting_rename(old: Any, new: Any) -> None:
        events.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "rename", noting_rename)
    raw.keep(DIGEST, FILES)
    at = events.index("rename")
    assert events[at - 3 : at - 1] == [CONFIG, WEIGHTS] and events[at - 1].startswith(".new-")
    assert events[at + 1 :] == ["raw"]
    assert events[: at - 3] == [raw.root.parent.parent.name, "deep", "store"]  # folders that were made


def test_a_copy_that_goes_while_it_is_being_kept_is_written_again(
    raw: RawStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.keep(DIGEST, FILES)
    real = raw.damaged

    def removing(digest: str) -> str | None:
        wrong = real(digest)
        monkeypatch.setattr(raw, "damaged", real)
        raw.remove(digest)  # another process cleans up at this very moment
        return wrong

    monkeypatch.setattr(raw, "damaged", removing)
    raw.keep(DIGEST, FILES)
    assert content(raw) == FILES


def test_a_sound_copy_that_another_process_kept_meanwhile_stays(
    raw: RawStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be just being read."""
    raw.keep(DIGEST, FILES)
    inode, real = raw.path(DIGEST).stat().st_ino, raw.damaged

    def missing(_: str) -> str:
        monkeypatch.setattr(raw, "damaged", real)
        return "missing"  # and then it is there

    monkeypatch.setattr(raw, "damaged", missing)
    raw.keep(DIGEST, FILES)
    assert raw.path(DIGEST).stat().st_ino == inode and entries(raw) == {DIGEST}


def test_content_does_not_come_by_the_system_s_temporary_folder(
    raw: RawStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That may be on another disk, from which nothing is renamed."""
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    raw.keep(DIGEST, FILES)
    assert content(raw) == FILES


def test_many_keep_the_same_at_once(raw: RawStore) -> None:
    """Fresh ones in the even rounds, with a damaged copy already there in the odd ones."""
    for turn in range(6):
        raw.remove(DIGEST)
        if turn % 2:
            raw.keep(DIGEST, FILES)
            (raw.path(DIGEST) / WEIGHTS).write_bytes(b"damaged")
        errors: list[Exception] = []
        start = threading.Barrier(8)

        def keep(start: threading.Barrier = start, errors: list[Exception] = errors) -> None:
            start.wait(60)
            try:
                raw.keep(DIGEST, FILES)
            except Exception as error:  # the test shows it
                errors.append(error)

        threads = [threading.Thread(target=keep) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == [] and content(raw) == FILES and entries(raw) == {DIGEST}


def test_what_was_read_is_read_again_only_when_it_changed_or_somebody_insists(
    raw: RawStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    inner = module.sha256_of
    monkeypatch.setattr(module, "sha256_of", lambda path: read.append(path.name) or inner(path))
    raw.keep(DIGEST, FILES)
    read.clear()

    def looks(*given: Any, **more: Any) -> list[str]:
        read.clear()
        raw.damaged(DIGEST, *given, **more)
        return list(read)

    assert RawStore(raw.root).damaged(DIGEST) is None and read == [CONFIG, WEIGHTS]  # by itself
    assert looks() == [CONFIG, WEIGHTS]
    assert looks() == looks() == []
    assert looks(again=True) == [CONFIG, WEIGHTS] and looks() == []
    for name in FILES:
        os.utime(raw.path(DIGEST) / name, ns=(1, 1))
        assert looks() == [CONFIG, WEIGHTS] and looks() == []
    assert raw.damaged("a" * 64) == f"{CONFIG} is missing"
