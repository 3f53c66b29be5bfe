"""Stores of one bucket: what the audit log says of changes that were interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.adapters.read import content_digest
from safelora_vllm.errors import StoreUnavailable
from safelora_vllm.remote.bucket import Conflict
from safelora_vllm.store import AdapterRecord, RawStore, Version
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.store.layout import AUDIT
from safelora_vllm.store.mirror import MirroredNames
from safelora_vllm.store.recorded import UNFINISHED, Line, RecordedNames
from tests.mirror_writer import files


class Killed(BaseException):
    """The process ends here."""


class Memory:
    """A bucket. broken: what the next write of a name does, besides or instead of it."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.broken = ""
        self._writes = 0

    def get(self, path: str, _bytes: int = 0) -> tuple[bytes, str] | None:
        return self.objects.get(path)

    def size(self, path: str) -> int | None:
        return len(self.objects[path][0]) if path in self.objects else None

    def etags(self, folder: str) -> dict[str, str]:
        found = self.objects.items()
        return {path.rpartition("/")[2]: etag for path, (_, etag) in found if path.startswith(f"{folder}/")}

    def put(self, path: str, content: bytes, etag: str | None) -> str:
        broken, self.broken = (self.broken, "") if path.startswith("names/") else ("", self.broken)
        if broken == "does not answer":
            raise StoreUnavailable("the bucket cannot be written")
        if (self.objects[path][1] if path in self.objects else None) != etag:
            raise Conflict
        self._writes += 1
        self.objects[path] = (content, str(self._writes))
        if broken == "killed":
            raise Killed
        if broken == "answer lost":  # the client repeats the request, whose condition does not hold any more
            raise Conflict
        if broken == "killed, no answer":
            raise StoreUnavailable("the bucket cannot be written")
        return str(self._writes)


class Server:
    """One of several, with a disk of its own."""

    def __init__(self, root: Path, bucket: Memory) -> None:
        self.root, self.bucket = root, bucket
        self.start()

    def start(self) -> None:
        self.names = MirroredNames(self.root, self.bucket)  # type: ignore[arg-type]
        self.recorded = RecordedNames(self.names, AuditLog(self.root / AUDIT))

    def upload(self, number: int, by: str = "acme/ci") -> None:
        content = files("x", number)
        digest = content_digest(*content.values())
        RawStore(self.root).keep(digest, content)
        version = Version(0, digest, 3, 1, 1.0, by, id=number)

        def details(record: AdapterRecord | None) -> dict[str, Any]:
            return {"decision": "accepted", "version": record.live.version if record else 0}

        self.recorded.update(
            "acme/x", lambda record: (record or AdapterRecord("acme/x")).with_version(version),
            Line(by, "upload", details),
        )  # fmt: skip

    def remove(self) -> None:
        line = Line("acme/ci", "delete", lambda _: {"decision": "removed"})
        self.recorded.update("acme/x", lambda _: None, line)

    def lines(self) -> list[tuple[str, str, str, int | None]]:
        found = AuditLog(self.root / AUDIT).read()
        return [(r["actor"], r["action"], r["decision"], r.get("version")) for r in found]

    def unfinished(self) -> int:
        return len(list((self.root / AUDIT / UNFINISHED).glob("*")))


@pytest.fixture
def servers(tmp_path: Path) -> tuple[Server, Server]:
    bucket = Memory()
    return Server(tmp_path / "one", bucket), Server(tmp_path / "two", bucket)


@pytest.mark.parametrize("pulled", [False, True])
def test_killed_after_the_bucket_has_it(servers: tuple[Server, Server], pulled: bool) -> None:
    """The change is in force everywhere, so the next start adds its line, before or after it looks."""
    one, _ = servers
    one.bucket.broken = "killed"
    with pytest.raises(Killed):
        one.upload(1)
    one.start()
    if pulled:
        one.names.pull()
    one.recorded.settle()
    one.names.pull()
    assert one.names.get("acme/x") and one.lines() == [("acme/ci", "upload", "accepted", 1)]
    assert one.unfinished() == 0


def test_a_bucket_that_does_not_answer_at_the_start(
    servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not known whether the change was made: that waits."""
    one, _ = servers
    one.bucket.broken = "killed, no answer"
    with pytest.raises(StoreUnavailable):
        one.upload(1)

    def fails(*_: Any) -> Any:
        raise StoreUnavailable("the bucket cannot be read")

    with monkeypatch.context() as patch, pytest.raises(StoreUnavailable):
        patch.setattr(Memory, "get", fails)
        one.recorded.settle()
    assert one.lines() == [] and one.unfinished() == 1
    one.upload(2)
    assert one.lines() == [("acme/ci", "upload", "accepted", 1), ("acme/ci", "upload", "accepted", 2)]


def test_a_change_that_failed_has_no_line(servers: tuple[Server, Server]) -> None:
    one, _ = servers
    one.bucket.broken = "does not answer"
    with pytest.raises(StoreUnavailable):
        one.upload(1, by="acme/mallory")
    one.upload(2)
    assert one.lines() == [("acme/ci", "upload", "accepted", 1)] and one.unfinished() == 0


def test_a_change_that_failed_before_another_servers(servers: tuple[Server, Server]) -> None:
    """Nobody can tell any more whether it was made: the line says so."""
    one, two = servers
    one.bucket.broken = "does not answer"
    with pytest.raises(StoreUnavailable):
        one.upload(1, by="acme/mallory")
    two.upload(2)
    one.names.pull()
    one.remove()
    assert one.lines() == [
        ("acme/mallory", "upload", "unknown", 1), ("acme/ci", "delete", "removed", None),
    ]  # fmt: skip
    assert one.unfinished() == 0


def test_a_change_that_was_made_before_the_log_was_full(
    servers: tuple[Server, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = servers

    def full(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "record", full)
        one.upload(1)
        one.upload(2)
    one.recorded.settle()
    assert [line[2:] for line in one.lines()] == [("accepted", 1), ("accepted", 2)]


def test_an_answer_that_was_lost(servers: tuple[Server, Server]) -> None:
    """The repeated request is told that its condition does not hold: its own write came first."""
    one, _ = servers
    one.bucket.broken = "answer lost"
    one.upload(1)
    one.bucket.broken = "answer lost"
    one.remove()
    assert one.lines() == [("acme/ci", "upload", "accepted", 1), ("acme/ci", "delete", "removed", None)]
    assert one.names.all() == {} and one.unfinished() == 0
