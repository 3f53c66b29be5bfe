"""Published copies: found whole or not at all, marked, and written beside those who read them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from safelora_vllm.errors import StoreUnavailable
from safelora_vllm.policy import Policy
from safelora_vllm.report import Report
from safelora_vllm.store import PublishedStore
from safelora_vllm.store import published as module

KEY, GONE = "a" * 64, "b" * 64
FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}
REPORT = Report("", "c" * 64, "projectors", Policy(method="safe-lora"), True, [], [])


@pytest.fixture
def copies(store: PublishedStore) -> PublishedStore:
    """A store with one copy."""
    store.publish(KEY, FILES, REPORT)
    return store


def report_file(copies: PublishedStore) -> Path:
    return copies.path(KEY) / "report.json"


def test_a_copy_that_is_not_there(copies: PublishedStore) -> None:
    assert copies.find(GONE) is None and copies.report(GONE) is None and not copies.has_override(GONE)
    copies.touch(GONE)  # no error: it is made again
    with pytest.raises(FileNotFoundError):
        copies.state(GONE)
    with pytest.raises(StoreUnavailable, match=f"{copies.root} cannot be written"):
        copies.mark_override(GONE)
    assert copies.all() == [KEY]


def test_a_report_is_there_though_the_weights_are_damaged(copies: PublishedStore) -> None:
    assert copies.find(KEY) == copies.report(KEY) == REPORT
    (copies.path(KEY) / "adapter_model.safetensors").write_bytes(b"damaged")
    assert copies.find(KEY) is None and copies.report(KEY) == REPORT


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"report": {}, "report_sha256": ""}'])
def test_a_damaged_report_is_none(text: str, copies: PublishedStore) -> None:
    report_file(copies).write_text(text)
    assert copies.find(KEY) is None and copies.report(KEY) is None and not copies.has_override(KEY)


def test_a_changed_figure_makes_a_report_a_damaged_one(copies: PublishedStore) -> None:
    saved = json.loads(report_file(copies).read_text())
    saved["report"]["total_norm"] = 0.5
    report_file(copies).write_text(json.dumps(saved))
    assert copies.find(KEY) is None and copies.report(KEY) is None


def test_the_state_is_another_when_either_file_is(copies: PublishedStore) -> None:
    states = [copies.state(KEY)]
    for name in FILES:
        os.utime(copies.path(KEY) / name, (1000, 1000))
        states.append(copies.state(KEY))
    assert len(set(states)) == 3
    os.utime(report_file(copies), (1000, 1000))  # that is how a copy is touched
    assert copies.state(KEY) == states[-1]


def test_an_override_is_marked_once_and_nothing_else_changes(copies: PublishedStore) -> None:
    before = json.loads(report_file(copies).read_text())
    assert not copies.has_override(KEY)
    copies.mark_override(KEY)
    assert copies.has_override(KEY) and copies.find(KEY) == REPORT
    text, inode = report_file(copies).read_text(), report_file(copies).stat().st_ino
    assert json.loads(text) == {**before, "override": True}
    copies.mark_override(KEY)
    assert report_file(copies).read_text() == text and report_file(copies).stat().st_ino == inode


@pytest.mark.parametrize("value", [False, 1, "true", None])
def test_only_true_marks_an_override(value: object, copies: PublishedStore) -> None:
    saved = json.loads(report_file(copies).read_text())
    report_file(copies).write_text(json.dumps({**saved, "override": value}))
    assert not copies.has_override(KEY)


def test_a_report_is_for_people_too(copies: PublishedStore) -> None:
    """Indented by one, before and after the mark."""
    for mark in (lambda: None, lambda: copies.mark_override(KEY)):
        mark()
        text = report_file(copies).read_text()
        assert text == json.dumps(json.loads(text), indent=1)


def test_no_copy_is_synced_and_none_comes_by_the_system_s_temporary_folder(
    copies: PublishedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy can be made again; and that folder may be on another disk, from which nothing is renamed."""
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("synced"))
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    copies.publish(GONE, FILES, REPORT)
    assert copies.find(GONE) == REPORT


@pytest.mark.parametrize("damaged", [False, True])
def test_a_copy_that_another_process_published_meanwhile_stays_unless_it_is_damaged(
    damaged: bool, copies: PublishedStore
) -> None:
    weights = copies.path(KEY) / "adapter_model.safetensors"
    if damaged:
        weights.write_bytes(b"damaged")
    inode = weights.stat().st_ino
    assert copies.publish(KEY, FILES, REPORT) == copies.path(KEY)
    assert copies.find(KEY) == REPORT and (weights.stat().st_ino == inode) == (not damaged)


def test_a_full_disk_is_told_with_the_store(copies: PublishedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", failing)
        for write in (lambda: copies.publish(GONE, FILES, REPORT), lambda: copies.mark_override(KEY)):
            with pytest.raises(
                StoreUnavailable, match=f"adapter store {copies.root} cannot be written .No space"
            ):
                write()
    assert copies.find(KEY) == REPORT and not copies.has_override(KEY) and copies.all() == [KEY]
    shutil.rmtree(copies.path(KEY))
    assert copies.all() == []


def test_what_was_read_is_read_again_only_when_it_changed_or_somebody_insists(
    copies: PublishedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    inner = module.sha256_of
    monkeypatch.setattr(module, "sha256_of", lambda path: read.append(path.name) or inner(path))
    names = list(FILES)

    def looks(again: bool | None = None) -> list[str]:
        read.clear()
        assert copies.find(KEY, **({} if again is None else {"again": again})) == REPORT
        return list(read)

    assert looks() == names
    assert looks() == looks() == []
    assert looks(again=True) == names and looks() == []
    copies.forget(GONE)
    assert looks() == []
    copies.forget(KEY)
    assert looks() == names and looks() == []
    for name in names:
        os.utime(copies.path(KEY) / name, ns=(1, 1))
        assert looks() == names and looks() == []
    assert copies.find(GONE) is None
