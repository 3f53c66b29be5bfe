"""The folder of a gate's socket: nobody else's, and gone when its server is."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import pytest

from safelora_vllm.errors import GuardError
from safelora_vllm.gate.socket_folder import (
    private_folder,
    remove,
    remove_leftovers,
    remove_unowned,
    take_ownership,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the gate's socket would be."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"safelora-{os.getuid()}-instance"


def test_the_sockets_folder_is_made_for_this_user_only(folder: Path) -> None:
    before = os.umask(0)
    try:
        assert private_folder("instance") == folder
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_folder("instance") == folder, "the other workers of this host"


@pytest.mark.parametrize("mode", [0o710, 0o720, 0o740, 0o701, 0o702, 0o704, 0o777, 0o1777], ids=oct)
def test_a_sockets_folder_that_others_can_enter_is_refused(mode: int, folder: Path) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(GuardError, match="is open to other users; remove it and start again"):
        private_folder("instance")
    folder.chmod(0o700)
    private_folder("instance")


def test_a_sockets_folder_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the other user: it makes a folder with the name that is that of uid + 1."""
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    folder.with_name(f"safelora-{uid + 1}-instance").mkdir(mode=0o700)
    with pytest.raises(GuardError, match=f"safelora-{uid + 1}-instance is open to other users"):
        private_folder("instance")


def test_a_link_in_the_place_of_the_sockets_folder_is_refused(folder: Path) -> None:
    """Whoever owns the link could let it lead elsewhere later, though it leads to a private folder now."""
    private = folder.with_name("private")
    private.mkdir(mode=0o700)
    folder.symlink_to(private)
    with pytest.raises(GuardError, match="is open to other users"):
        private_folder("instance")


def test_one_owner_at_a_time(folder: Path) -> None:
    private_folder("instance")
    lock = take_ownership(folder)
    assert lock is not None and take_ownership(folder) is None
    remove_unowned(folder)
    assert folder.is_dir(), "its owner lives"
    lock.close()
    again = take_ownership(folder)
    assert again is not None
    again.close()
    remove_unowned(folder)
    assert not folder.exists()
    remove_unowned(folder)
    remove(folder)


def test_an_owner_that_is_just_ending_is_waited_for(folder: Path) -> None:
    private_folder("instance")
    lock = take_ownership(folder)
    assert lock is not None
    ending = threading.Timer(0.2, lock.close)
    ending.start()
    remove_unowned(folder, patience=60.0)
    assert not folder.exists()
    ending.join()


def test_only_what_is_ours_is_removed(folder: Path) -> None:
    private_folder("instance")
    (folder / "gate.sock").touch()
    for name in ("traffic-1-a", "exams-1.json", ".exams-1.json"):  # of API servers, one killed in a write
        (folder / name).touch()
    (folder / "other").touch()
    remove(folder)
    assert [path.name for path in folder.iterdir()] == ["other"]


def test_leftovers_of_ended_servers_go_and_others_stay(folder: Path) -> None:
    def aged(name: str, mode: int = 0o700) -> Path:
        made = folder.with_name(f"safelora-{os.getuid()}-{name}")
        made.mkdir()
        (made / "owner.lock").touch()
        (made / "gate.sock").touch()
        made.chmod(mode)
        os.utime(made, (1, 1))
        return made

    ended, open_to_others, running = aged("ended"), aged("open", 0o755), aged("running")
    other = folder.with_name(f"safelora-{os.getuid() + 1}-x")
    other.mkdir()
    linked = folder.with_name(f"safelora-{os.getuid()}-link")
    linked.symlink_to(other)
    new = private_folder("instance")
    lock = take_ownership(running)
    assert lock is not None
    os.utime(running, (1, 1))
    remove_leftovers()
    assert not ended.exists()
    assert all(path.exists() for path in (open_to_others, running, other, linked, new))
    lock.close()
    remove_leftovers()
    assert not running.exists() and new.exists()
