"""What may be removed and what may not, what `verify` finds, and what killed processes leave."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.adapters.read import content_digest
from safelora_vllm.errors import StoreDamaged
from safelora_vllm.policy import Policy
from safelora_vllm.report import Report
from safelora_vllm.store import AdapterRecord, NameStore, PublishedStore, RawStore, Version
from safelora_vllm.store.housekeeping import (
    Problem,
    clean,
    collect,
    collect_unreferenced,
    unreferenced_raw,
    verify,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HOUR = 3600.0
_ROUNDS = 60
_CONTEXT = multiprocessing.get_context("fork")  # quick, and safe: the children only handle files


def files(number: int, nbytes: int = 1000) -> dict[str, bytes]:
    """An upload's files; every number is another content."""
    return {CONFIG: b"{}", WEIGHTS: number.to_bytes(8, "big") + bytes(nbytes)}


def digest_of(number: int, nbytes: int = 1000) -> str:
    return content_digest(*files(number, nbytes).values())


def key_of(digest: str) -> str:
    """Any 64 digits do."""
    return hashlib.sha256(digest.encode()).hexdigest()


def put(root: Path, number: int, name: str | None = None, nbytes: int = 1000) -> str:
    """Keep and publish a content, and serve it under a name if there is one. Returns its digest."""
    digest = digest_of(number, nbytes)
    RawStore(root).keep(digest, files(number, nbytes))
    report = Report("", digest, "projectors", Policy(method="safe-lora"), True, [], [])
    PublishedStore(root).publish(key_of(digest), files(number, nbytes), report)
    if name is not None:
        new = Version(0, digest, nbytes, rank=4, created=float(number), by="tenant")
        NameStore(root).reserve_ids(1)
        NameStore(root).update(name, lambda old: (old or AdapterRecord(name)).with_version(new))
    return digest


def age(root: Path, digest: str, seconds: float) -> None:
    """Make the raw content and its published copy as if kept and used so long ago."""
    then = time.time() - seconds
    for path in (RawStore(root).path(digest), PublishedStore(root).path(key_of(digest)) / "report.json"):
        if path.exists():
            os.utime(path, (then, then))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def four(root: Path) -> list[str]:
    """Four contents, used 2, 3, 4 and 5 hours ago in this order."""
    digests = [put(root, number) for number in range(4)]
    for hours, digest in enumerate(digests, start=2):
        age(root, digest, hours * HOUR)
    return digests


def test_the_least_recently_used_copies_go_first(root: Path, four: list[str]) -> None:
    published = root / "published"
    total = size_of(published)
    assert collect(root, total).removed == ()
    first = collect(root, total - 1)
    assert first.removed == (key_of(four[3]),) and first.left == size_of(published) == total - first.freed
    PublishedStore(root).touch(key_of(four[2]))
    age_of_second = 3 * HOUR
    assert collect(root, 0, min_age_seconds=age_of_second - 60).removed == (key_of(four[1]),)
    assert collect(root, 0).removed == (key_of(four[0]),)
    assert PublishedStore(root).all() == [key_of(four[2])]  # touched, so used a moment ago
    assert collect(root, 0, min_age_seconds=0).left == size_of(published) == 0
    assert sorted(RawStore(root).all()) == sorted(four)  # never raw ones


def test_a_budget_of_zero_removes_all_that_may_go(root: Path, four: list[str]) -> None:
    collected = collect(root, 0)
    assert collected.removed == tuple(key_of(digest) for digest in reversed(four))
    assert list((root / "published").iterdir()) == [] and verify(root) == []


@pytest.mark.parametrize(
    "why", ["live", "rolled back to", "no raw", "half raw", "young", "damaged", "report"]
)
def test_what_may_not_go(why: str, root: Path, four: list[str]) -> None:
    keep, raw = four[2], RawStore(root)
    copy = PublishedStore(root).path(key_of(keep))
    if why == "live":
        put(root, 2, "x")
    elif why == "rolled back to":
        put(root, 2, "x")
        put(root, 1, "x")
        NameStore(root).update("x", lambda old: old and dataclasses.replace(old, current=1))
    elif why == "no raw":
        raw.remove(keep)
    elif why == "half raw":
        (raw.path(keep) / WEIGHTS).unlink()
    elif why == "damaged":
        (copy / "report.json").write_text("{")
    elif why == "report":
        (copy / "report.json").unlink()
    for digest in four:
        age(root, digest, (0.9 if why == "young" and digest == keep else 5) * HOUR)
    collected = collect(root, 0)
    assert set(collected.removed) == {key_of(digest) for digest in four} - {key_of(keep)}
    assert copy.is_dir() and collected.left == size_of(copy)


def test_copies_of_older_versions_may_go(root: Path) -> None:
    old, new = put(root, 0, "x"), put(root, 1, "x")
    for digest in (old, new):
        age(root, digest, 2 * HOUR)
    assert collect(root, 0).removed == (key_of(old),)


def test_every_copy_of_a_live_content_stays(root: Path) -> None:
    """A content is published once for each policy; which of them is served is not looked at."""
    digest = put(root, 0, "x")
    report = Report("", digest, "projectors", Policy(method="safe-lora", mode="report-only"), True, [], [])
    PublishedStore(root).publish("f" * 64, files(0), report)
    for copy in (root / "published").iterdir():
        os.utime(copy / "report.json", (1000, 1000))
    assert collect(root, 0).removed == ()


def test_a_copy_that_is_used_while_others_go_stays(
    root: Path, four: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RawStore.has

    def using(store: RawStore, digest: str) -> bool:
        PublishedStore(root).touch(key_of(four[0]))  # a request for it, after the copies were listed
        return real(store, digest)

    monkeypatch.setattr(RawStore, "has", using)
    assert set(collect(root, 0).removed) == {key_of(digest) for digest in four[1:]}


def test_collecting_in_an_empty_place(root: Path) -> None:
    assert collect(root, 0) == collect_unreferenced(root)
    assert unreferenced_raw(root) == [] and verify(root) == []
    clean(root)
    assert not root.exists()


def test_a_damaged_name_is_no_reason_not_to_collect_but_its_raw_stays(root: Path, four: list[str]) -> None:
    put(root, 9, "x")
    (root / "names" / "x.json").write_text("{")
    assert len(collect(root, 0).removed) == len(four)
    for look in (unreferenced_raw, collect_unreferenced):
        with pytest.raises(StoreDamaged, match=r"x\.json may refer to some of it"):
            look(root, 0)
    assert len(RawStore(root).all()) == 5


def test_unreferenced_raw(root: Path, four: list[str]) -> None:
    put(root, 0, "x")
    put(root, 1, "x")  # the first is an older version now
    for digest in four[:3]:
        age(root, digest, 2 * HOUR)
    age(root, four[3], 0.5 * HOUR)
    assert unreferenced_raw(root) == [four[2]]
    assert unreferenced_raw(root, min_age_seconds=0) == sorted(four[2:])
    NameStore(root).update("x", lambda _: None)
    assert unreferenced_raw(root) == sorted(four[:3])


def test_collecting_unreferenced_content_takes_its_copies_too(root: Path, four: list[str]) -> None:
    put(root, 0, "x")
    for digest in four:
        age(root, digest, 2 * HOUR)
    PublishedStore(root).touch(key_of(four[1]))  # loaded by its path, say
    before = size_of(root / "published") + size_of(root / "raw")
    collected = collect_unreferenced(root)
    gone = {name for digest in four[2:] for name in (digest, key_of(digest))}
    assert set(collected.removed) == gone
    assert RawStore(root).all() == sorted(four[:2])
    assert PublishedStore(root).all() == sorted(map(key_of, four[:2]))
    assert collected.left == size_of(root / "raw")
    assert collected.freed == before - size_of(root / "published") - size_of(root / "raw")
    assert verify(root) == []


def test_content_that_is_kept_again_while_it_is_being_removed_stays(
    root: Path, four: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload of the same bytes: kept, and its name is not yet written."""
    real = RawStore.nbytes

    def keeping(store: RawStore, digest: str) -> int:
        store.keep(digest, files(four.index(digest)))
        return real(store, digest)

    monkeypatch.setattr(RawStore, "nbytes", keeping)
    collect_unreferenced(root)
    assert RawStore(root).all() == sorted(four)


def problem(root: Path, **options: Any) -> Problem:
    """The only one."""
    (found,) = verify(root, **options)
    return found


def test_verify_names_each_problem_and_what_to_do(root: Path) -> None:
    old, new, other = put(root, 0, "acme/x"), put(root, 1, "acme/x"), put(root, 2)
    raw, published = RawStore(root), PublishedStore(root)
    assert verify(root) == []

    (raw.path(old) / WEIGHTS).write_bytes(b"damaged")
    assert "its content has the digest" in problem(root).found
    assert problem(root).remedy == "upload the adapter again (version 1 of 'acme/x')"
    raw.remove(old)
    assert problem(root).where == str(raw.path(old)) and problem(root).found == f"{CONFIG} is missing"
    put(root, 0)

    raw.remove(new)
    assert "version 2 of 'acme/x', which is served" in problem(root).remedy
    put(root, 1)

    (raw.path(other) / CONFIG).write_bytes(b"damaged")
    assert "gc --unreferenced" in problem(root).remedy
    put(root, 2)

    copy = published.path(key_of(new))
    (copy / WEIGHTS).write_bytes(b"damaged")
    assert problem(root).where == str(copy) and "the next load makes it again" in problem(root).remedy
    put(root, 1)

    (root / "names" / "bad.json").write_text("{}")
    assert problem(root).where == str(root / "names" / "bad.json")
    assert "no record of a name" in problem(root).found and "delete it" in problem(root).remedy
    assert str(problem(root)) == f"{problem(root).where}: {problem(root).found}; {problem(root).remedy}"
    (root / "names" / "bad.json").unlink()

    (root / "ids").unlink()
    assert (
        problem(root).where == str(root / "ids")
        and "is missing, but the store has names" in problem(root).found
    )


def test_verify_shows_its_progress_and_changes_nothing(root: Path, four: list[str]) -> None:
    put(root, 9, "x")
    RawStore(root).remove(four[0])  # known as published, not as raw any more: nobody refers to it
    shown: list[int] = []

    def progress(checks: list[Any]) -> Iterator[Any]:
        shown.append(len(checks))
        yield from checks

    before = {path: path.stat() for path in root.rglob("*")}
    assert verify(root, progress) == [] and shown == [4 + 5]
    after = {path: path.stat() for path in root.rglob("*")}
    assert {path: (s.st_mtime_ns, s.st_size) for path, s in before.items()} == {
        path: (s.st_mtime_ns, s.st_size) for path, s in after.items()
    }


def test_leftovers_are_removed_when_they_are_old(root: Path) -> None:
    put(root, 0, ".new-adapter")  # a record that is called nearly like a temporary file
    leftovers = []
    for place in ("incoming", "names", "published", "raw"):
        (root / place).mkdir(exist_ok=True)
        for kind in ("old", "young"):
            path = root / place / (kind if place == "incoming" else f".new-{kind}")
            if place == "names":
                path.write_text("{")
            else:
                (path / "deep").mkdir(parents=True)
                (path / "deep" / WEIGHTS).write_text("half")
            for found in (path, *path.rglob("*")):
                os.utime(found, (1000, 1000) if kind == "old" else None)
            leftovers.append(path)
    # Begun long ago, but a slow client still sends.
    growing = root / "incoming" / "growing"
    (growing / "deep").mkdir(parents=True)
    (growing / "deep" / WEIGHTS).write_text("half")
    for found in (growing, growing / "deep"):
        os.utime(found, (1000, 1000))
    (root / "raw" / ".new-gone").symlink_to("nowhere")  # listed, but nothing to ask for its age

    old, young = leftovers[::2], [*leftovers[1::2], growing]
    assert [problem.where for problem in verify(root)] == [str(path) for path in old]
    clean(root)
    assert not any(path.exists() for path in old) and all(path.exists() for path in young)
    assert verify(root) == [] and set(NameStore(root).all()) == {".new-adapter"}
    clean(root, stale_seconds=-1)
    assert not any(path.exists() for path in young)
    assert verify(root) == [] and set(NameStore(root).all()) == {".new-adapter"}


def serve_on_and_on(root: Path, told: Connection) -> None:
    """In a process of its own: uploads to one name without end, each told when it is done."""
    for number in itertools.count(time.time_ns()):
        put(root, number, "x", nbytes=20_000)
        record = NameStore(root).get("x")
        assert record is not None
        told.send(record.current)


def temporary_only(root: Path) -> None:
    """Nothing is wrong in a store but that, at most, temporary files lie there."""
    wrong = [p for p in verify(root, stale_seconds=-1) if not Path(p.where).name.startswith(".new-")]
    assert wrong == []


def test_a_writer_killed_at_random_moments(root: Path) -> None:
    """Between its last report and its death it may have finished one more update, never a half one."""
    chance, current = random.Random(0), 0
    for _ in range(_ROUNDS):
        ours, theirs = _CONTEXT.Pipe(duplex=False)
        process = _CONTEXT.Process(target=serve_on_and_on, args=(root, theirs))
        process.start()
        theirs.close()
        told = ours.recv()  # it is at work
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join()
        while ours.poll():
            try:
                told = ours.recv()
            except EOFError:
                break
        ours.close()
        assert process.exitcode == -signal.SIGKILL
        temporary_only(root)
        record = NameStore(root).get("x")
        assert record is not None and record.current in (told, told + 1) and told > current
        assert [v.version for v in record.versions][-1] == record.current
        assert RawStore(root).damaged(record.live.digest) is None
        current = record.current
        clean(root, stale_seconds=-1)
        collect_unreferenced(root, min_age_seconds=0)
        assert verify(root, stale_seconds=-1) == []


def die_at(call: int, action: Callable[..., object], *arguments: object) -> None:
    """In a process of its own: an action, killed before its n-th change of the file system."""
    calls = itertools.count()

    def killing(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def wrapper(*arguments: Any, **options: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*arguments, **options)

        setattr(owner, name, wrapper)

    for name in ("open", "mkdir", "write", "fsync", "replace", "rename", "rmdir", "unlink", "utime"):
        killing(os, name)
    action(*arguments)


@pytest.mark.parametrize("state", ["empty", "old version", "damaged"])
def test_a_writer_killed_before_every_single_step(state: str, root: Path, tmp_path: Path) -> None:
    """Without luck: before each change of the file system in turn, until none is left."""
    start = tmp_path / "start"
    start.mkdir()
    if state != "empty":
        put(start, 0, "x")
    if state == "damaged":  # kept before, and damaged since
        put(start, 1)
        (RawStore(start).path(digest_of(1)) / WEIGHTS).write_bytes(b"damaged")
        (PublishedStore(start).path(key_of(digest_of(1))) / WEIGHTS).write_bytes(b"damaged")
    before = NameStore(start).get("x")
    seen = set()
    for call in itertools.count():
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(start, root)
        process = _CONTEXT.Process(target=die_at, args=(call, put, root, 1, "x"))
        process.start()
        process.join()
        record = NameStore(root).get("x")
        seen.add(record and record.current)
        if record != before:
            assert record is not None and record.live.digest == digest_of(1)
        if state != "damaged":
            temporary_only(root)
        elif record != before:
            assert RawStore(root).damaged(digest_of(1)) is None
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        put(root, 1, "x")  # and the next upload goes through
        temporary_only(root)
    assert call > 20 and seen == ({None, 1} if state == "empty" else {1, 2})


def test_a_collector_killed_before_every_single_step(root: Path, tmp_path: Path) -> None:
    """Content and copies are whole or gone."""
    start = tmp_path / "start"
    for number in range(2):
        put(start, number)
    for call in itertools.count():
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(start, root)
        process = _CONTEXT.Process(target=die_at, args=(call, collect_unreferenced, root, 0))
        process.start()
        process.join()
        temporary_only(root)
        copies, raw = PublishedStore(root).all(), RawStore(root).all()
        assert set(copies) <= set(map(key_of, raw))  # a copy goes before what it was made of
        if process.exitcode == 0:
            break
    assert call > 10 and copies == raw == []
