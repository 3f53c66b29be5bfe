"""A process that is killed between a name's record and the audit log loses no line, and adds none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.errors import StoreUnavailable
from safelora_vllm.store import AdapterRecord, NameStore, Version
from safelora_vllm.store import names as names_module
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.store.layout import AUDIT
from safelora_vllm.store.recorded import UNFINISHED, Line, RecordedNames


class Killed(BaseException):
    """The process ends here."""


def killed(*_: Any, **__: Any) -> Any:
    raise Killed


class Store:
    """A store as one process after the other uses it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def process(self) -> RecordedNames:
        return RecordedNames(NameStore(self.root), AuditLog(self.root / AUDIT))

    def upload(self, digit: str, process: RecordedNames | None = None, name: str = "acme/x") -> None:
        version = Version(0, digit * 64, 1, 1, 0.0, "acme/ci")
        line = Line("acme/ci", "upload", lambda after: {"version": after.live.version if after else 0})
        (process or self.process()).update(
            name, lambda record: (record or AdapterRecord(name)).with_version(version), line
        )

    def remove(self) -> None:
        self.process().update("acme/x", lambda _: None, Line("acme/ci", "delete", lambda _: {}))

    def lines(self) -> list[tuple[str, int | None]]:
        return [(r["action"], r.get("version")) for r in AuditLog(self.root / AUDIT).read()]

    def unfinished(self) -> int:
        return len(list((self.root / AUDIT / UNFINISHED).glob("*")))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path)
    made.upload("1")
    assert made.lines() == [("upload", 1)] and made.unfinished() == 0
    return made


def test_a_line_that_was_not_written_is_completed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AuditLog, "record", killed)
        store.upload("2")
    assert store.lines() == [("upload", 1)]
    for _ in range(2):  # each start looks
        store.process().settle()
        assert store.lines() == [("upload", 1), ("upload", 2)] and store.unfinished() == 0
    *_, last = AuditLog(store.root / AUDIT).read()
    assert last["begun"] <= last["time"] and last["actor"] == "acme/ci"


def test_the_lines_are_completed_without_a_folder_of_names_and_a_disk_that_fails_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AuditLog, "record", killed)
        store.upload("2")
    (store.root / "names").rename(store.root / "elsewhere")
    (store.root / "names").write_text("a file in its place")
    with pytest.raises(StoreUnavailable, match="cannot be written"):
        store.process().settle()
    (store.root / "names").unlink()
    store.process().settle()
    assert store.unfinished() == 0


def test_the_removal_of_a_name_is_completed_by_the_next_change_of_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AuditLog, "record", killed)
        store.remove()
    store.upload("1")
    assert store.lines() == [("upload", 1), ("delete", None), ("upload", 1)], "in their order"
    assert store.unfinished() == 0


def test_a_change_that_was_not_made_has_no_line(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(names_module, "replace_file", killed)
        store.upload("2")
    assert store.unfinished() == 1
    store.upload("3")
    store.process().settle()
    assert store.lines() == [("upload", 1), ("upload", 2)] and store.unfinished() == 0
    assert [record.live.digest for record in NameStore(store.root).all().values()] == ["3" * 64]


def test_a_line_that_was_written_is_not_written_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", killed)
        store.upload("2")
    assert store.unfinished() == 1
    store.process().settle()
    assert store.lines() == [("upload", 1), ("upload", 2)] and store.unfinished() == 0


def test_a_full_log_undoes_nothing_and_gets_its_line_later(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "record", full)
        store.upload("2")
        assert "upload of 'acme/x' by acme/ci is not in the audit log: no space left" in caplog.text
        store.upload("3")
        assert store.unfinished() == 2
    store.upload("4", name="acme/y")
    assert store.lines() == [("upload", 1), ("upload", 1)], "another name's change does not look"
    store.process().settle()
    assert store.lines() == [("upload", 1), ("upload", 1), ("upload", 2), ("upload", 3)]


def test_a_file_that_is_not_ours_is_left_alone(store: Store) -> None:
    folder = store.root / AUDIT / UNFINISHED
    (folder / "other.json").write_text("{")
    store.process().settle()
    assert store.lines() == [("upload", 1)] and (folder / "other.json").exists()
