"""Files and folders that are written whole, brought to the disk, private, and removed again."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from safelora_vllm import files
from safelora_vllm.errors import StoreUnavailable
from safelora_vllm.files import (
    digests_in,
    is_digest,
    leftovers,
    locked,
    make_folder,
    put_folder,
    remove_folder,
    remove_leftovers,
    replace_file,
    sync_folder,
    temporary_folder,
    write_file,
    writing,
)

DIGEST = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    """Modes are what the code asks for, whatever the user's umask is."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what was brought to the disk, in order."""
    names: list[str] = []

    def fsync(descriptor: int) -> None:
        names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def open_files() -> set[Path]:
    """What this process has open, by descriptor."""
    return set(Path("/proc/self/fd").iterdir())


def test_a_file_is_private_and_new(tmp_path: Path, synced: list[str]) -> None:
    path = tmp_path / "x"
    write_file(path, b"data", durable=True)
    assert (path.read_bytes(), mode(path), synced) == (b"data", 0o600, ["x"])
    with pytest.raises(FileExistsError):
        write_file(path, b"other", durable=True)
    write_file(tmp_path / "y", b"", durable=False)
    assert synced == ["x"], "what can be made again is not synced"


def test_what_the_system_takes_in_parts_is_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    write_file(tmp_path / "x", b"0123456789", durable=False)
    replace_file(tmp_path / "y", b"0123456789")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes() == b"0123456789"


def test_a_replaced_file_is_on_the_disk_before_its_folder(tmp_path: Path, synced: list[str]) -> None:
    path = tmp_path / "x"
    replace_file(path, b"one")
    replace_file(path, b"two")
    assert (path.read_bytes(), mode(path)) == (b"two", 0o600)
    assert [name.startswith(".new-") for name in synced] == [True, False] * 2
    assert synced[1::2] == [tmp_path.name] * 2


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "stop"])
def test_a_replacement_that_fails_leaves_the_old_file_alone(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = tmp_path / "x", open_files()
    path.write_bytes(b"old")

    def fail(_: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)):
        replace_file(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"old")]
    assert open_files() == before


def test_folders_are_private_and_each_parent_is_on_the_disk(tmp_path: Path, synced: list[str]) -> None:
    make_folder(tmp_path / "a" / "b")
    assert [mode(tmp_path / "a"), mode(tmp_path / "a" / "b")] == [0o700] * 2
    assert synced == [tmp_path.name, "a"]
    make_folder(tmp_path / "a" / "b")
    assert len(synced) == 2, "one that is there costs nothing"


def test_two_processes_make_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one makes it between the look and the making."""
    folder, is_dir = tmp_path / "a", Path.is_dir
    looks: list[int] = []

    def look(path: Path) -> bool:
        if path == folder and not looks:
            looks.append(1)
            folder.mkdir()
            return False
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", look)
    make_folder(folder)
    assert looks


def test_nothing_stays_open(tmp_path: Path) -> None:
    before = open_files()
    with locked(tmp_path):
        pass
    sync_folder(tmp_path)
    write_file(tmp_path / "x", b"x", durable=True)
    replace_file(tmp_path / "x", b"y")
    make_folder(tmp_path / "f")
    assert open_files() == before


def test_a_lock_is_held_alone_and_is_private(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert mode(tmp_path / ".lock") == 0o600
        with (tmp_path / ".lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_a_lock_ends_with_its_block_although_a_forked_child_has_it_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = os.close
    copies: list[int] = []
    monkeypatch.setattr(os, "close", lambda fd: (copies.append(os.dup(fd)), close(fd)))
    with pytest.raises(ValueError, match="within"), locked(tmp_path):
        raise ValueError("within")
    monkeypatch.undo()
    with (tmp_path / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    for copy in copies:
        close(copy)


def test_a_temporary_folder_is_private_and_gone_afterwards(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="within"), temporary_folder(tmp_path) as folder:
        assert folder.parent == tmp_path and folder.name.startswith(".new-") and mode(folder) == 0o700
        (folder / "x").write_text("x")
        raise ValueError("within")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A folder to be put in its place."""
    folder = tmp_path / ".new-made"
    folder.mkdir()
    (folder / "x").write_text("new")
    return folder


def damaged(folder: Path) -> None:
    folder.mkdir()
    (folder / "x").write_text("damaged")


def test_a_damaged_folder_is_replaced_however_often_others_put_it_there(new: Path, tmp_path: Path) -> None:
    folder, looks = tmp_path / "f", []
    damaged(folder)

    def intact() -> bool:
        """Another process puts a damaged folder there after the first three were moved away."""
        looks.append(1)
        return False

    def removed(path: Path) -> None:
        shutil.rmtree(path)
        if len(looks) < 4:
            damaged(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "remove_folder", removed)
        put_folder(new, folder, intact)
    assert (folder / "x").read_text() == "new" and len(looks) == 4


def test_a_folder_that_cannot_be_replaced_is_told_after_five_times(new: Path, tmp_path: Path) -> None:
    folder, looks = tmp_path / "f", []
    damaged(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(files, "remove_folder", lambda _: None)
        put_folder(new, folder, lambda: bool(looks.append(1)))
    assert len(looks) == 5


def test_an_intact_folder_of_another_process_stays(new: Path, tmp_path: Path) -> None:
    damaged(tmp_path / "f")
    put_folder(new, tmp_path / "f", lambda: True)
    assert (tmp_path / "f" / "x").read_text() == "damaged"


def test_a_file_in_the_place_of_a_folder_is_nothing_to_remove(new: Path, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    looks: list[int] = []
    with pytest.raises(NotADirectoryError):
        put_folder(new, tmp_path / "f", lambda: bool(looks.append(1)))
    assert (tmp_path / "f").read_text() == "mine" and len(looks) == 1


def test_a_folder_is_renamed_before_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[Path] = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: deleted.append(Path(path)))
    for _ in range(2):
        damaged(tmp_path / "f")
        remove_folder(tmp_path / "f")
        assert not (tmp_path / "f").exists()
    remove_folder(tmp_path / "f")  # one that is not there
    assert len(set(deleted)) == 2 and all(path.name.startswith(".new-") for path in deleted)


@pytest.fixture
def old(tmp_path: Path) -> Generator[Callable[[str], Path], None, None]:
    """Makes a path that nobody has written to for 100 seconds."""

    def make(name: str) -> Path:
        path = tmp_path / name
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_text("x")
        os.utime(path, (time.time() - 100,) * 2)
        return path

    yield make


def test_leftovers_are_temporary_and_old(old: Callable[[str], Path], tmp_path: Path) -> None:
    file, folder = old(".new-file"), old(".new-folder/")
    others = [old(".new-adapter.json"), old("new-file"), old(".lock")]
    growing = old(".new-growing/")
    (growing / "x").write_text("now")
    os.utime(growing, (time.time() - 100,) * 2)
    assert leftovers(tmp_path, 50.0) == [file, folder]
    assert leftovers(tmp_path, 200.0) == []
    assert leftovers(tmp_path, 50.0, everything=True) == sorted([file, folder, *others])
    assert leftovers(tmp_path / "none", 0.0) == []
    remove_leftovers(tmp_path, 50.0)
    assert sorted(tmp_path.iterdir()) == sorted([*others, growing])
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*others, growing]), "by default an hour old"


def test_of_a_link_the_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    damaged(kept)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".new-link").symlink_to(kept)
    remove_leftovers(tmp_path / "store", -1.0)
    assert not list((tmp_path / "store").iterdir())
    assert (kept / "x").read_text() == "damaged"


def test_a_leftover_that_cannot_be_removed_does_not_keep_the_others(
    old: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = old(".new-1"), old(".new-2")
    unlink = Path.unlink

    def failing(path: Path, missing_ok: bool = False) -> None:
        if path == first:
            raise PermissionError
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", failing)
    remove_leftovers(tmp_path, 50.0)
    assert first.exists() and not second.exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [(DIGEST, True), (DIGEST[1:], False), (DIGEST + "0", False), (DIGEST.upper(), False), ("", False)],
)
def test_names_of_contents(text: str, found: bool) -> None:
    assert is_digest(text) is found


def test_contents_are_listed_by_name(tmp_path: Path) -> None:
    names = [DIGEST[i:] + DIGEST[:i] for i in (5, 3, 9, 0)]
    for name in (*names, "other"):
        (tmp_path / name).mkdir()
    assert digests_in(tmp_path) == sorted(names)
    assert digests_in(tmp_path / "none") == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        digests_in(tmp_path / "file")


def test_an_error_without_words_of_the_system_is_told_in_its_own(tmp_path: Path) -> None:
    for error, words in ((OSError(errno.EROFS, "Read-only"), "Read-only"), (OSError("odd"), "odd")):
        told = pytest.raises(StoreUnavailable, match=rf"cannot be written \({words}\); free space")
        with told, writing(tmp_path):
            raise error


def test_threads_take_a_lock_in_turn(tmp_path: Path) -> None:
    inside: list[int] = []

    def work() -> None:
        with locked(tmp_path):
            inside.append(1)
            time.sleep(0.005)
            assert len(inside) == 1
            inside.pop()

    failures: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", failures.append)
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not failures
