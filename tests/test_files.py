"""Which files are taken to be sound without reading them again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from safelora_vllm import files
from safelora_vllm.files import FoundSound, file_state, replace_file, sha256_of, states

CHANGES: dict[str, Callable[[Path], object]] = {
    "other bytes": lambda path: path.write_bytes(b"other bytes"),
    "as many bytes": lambda path: path.write_bytes(b"B"),
    "replaced by the same": lambda path: replace_file(path, b"b"),
    "removed": Path.unlink,
    "its time alone": lambda path: os.utime(path, ns=(1, 1)),
}


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_text(path.name)
        os.utime(path, ns=(0, 0))
    return paths


def test_what_was_found_sound_stays_so_for_its_own_key(pair: list[Path]) -> None:
    sound = FoundSound()
    assert not sound.has("x", pair)
    sound.add("x", states(pair))
    assert sound.has("x", pair)
    assert not sound.has("y", pair) and not sound.has("x", pair[:1]) and not sound.has("x", pair[::-1])


def test_a_state_is_both_times_the_size_and_the_inode(pair: list[Path]) -> None:
    """Each says what the others do not: a file of the same size and times may be another one."""
    status = pair[0].stat()
    assert file_state(status) == (0, status.st_ctime_ns, 1, status.st_ino)
    assert 0 not in (status.st_ctime_ns, status.st_ino)


def test_what_is_forgotten_is_read_again(pair: list[Path]) -> None:
    sound = FoundSound()
    for key in "xy":
        sound.add(key, states(pair))
    sound.forget("x")
    sound.forget("never found")
    assert not sound.has("x", pair) and sound.has("y", pair)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", [0, 1])
def test_until_a_file_changes(change: str, which: int, pair: list[Path]) -> None:
    sound = FoundSound()
    sound.add("x", states(pair))
    CHANGES[change](pair[which])
    assert not sound.has("x", pair)


def test_states_from_before_a_change_are_not_those_after_it(pair: list[Path]) -> None:
    """What is exchanged while it is read is read again."""
    before = states(pair)
    replace_file(pair[1], b"b")
    sound = FoundSound()
    sound.add("x", before)
    assert not sound.has("x", pair)


def test_missing_files_are_never_sound(tmp_path: Path) -> None:
    sound = FoundSound()
    sound.add("x", ())
    assert not sound.has("x", [tmp_path / "a"])


def test_its_memory_is_bounded(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_REMEMBERED", 3)
    sound = FoundSound()
    for key in "abcd":
        sound.add(key, states(pair))
    assert [key for key in "abcd" if sound.has(key, pair)] == ["d"]


def test_the_digest_of_a_file(pair: list[Path]) -> None:
    assert sha256_of(pair[0]).hex() == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
