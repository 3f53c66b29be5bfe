"""One published copy: what it was made of, when it was used, and what keeps it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from safelora_vllm.errors import GuardError, StoreUnavailable
from safelora_vllm.store import PublishedStore, RawStore, housekeeping
from safelora_vllm.store.housekeeping import check_store, collect, collect_unreferenced, unreferenced_raw
from tests.test_store_housekeeping import HOUR, age, digest_of, key_of, put


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def copies(root: Path) -> list[housekeeping._Copy]:
    return housekeeping._copies(root)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "{}", '{"report": 5}', '{"report": {}}', '{"report": {"digest": 5}}',
        '{"report": {"digest": null}}', '{"report": {"digest": "../raw"}}', '{"report": {"digest": ""}}',
        json.dumps({"report": {"digest": "A" * 64}}), json.dumps({"report": {"digest": "a" * 63}}),
    ],
)  # fmt: skip
def test_a_report_that_does_not_say_its_content_has_none(text: str, root: Path) -> None:
    digest = put(root, 1)
    (copy,) = copies(root)
    assert copy.digest() == digest
    (copy.folder / "report.json").write_text(text)
    assert copy.digest() is None


def test_copies_are_ordered_by_when_they_were_used_and_not_by_when_they_were_read(root: Path) -> None:
    digests = [put(root, number) for number in range(3)]
    now = time.time()
    for number, digest in enumerate(digests):
        report = PublishedStore(root).path(key_of(digest)) / "report.json"
        os.utime(report, (now - 9 * HOUR + number, now - 5 * HOUR - number * HOUR))
    assert [copy.folder.name for copy in copies(root)] == [key_of(digest) for digest in digests[::-1]]
    sizes = [sum(file.stat().st_size for file in copy.folder.iterdir()) for copy in copies(root)]
    assert [copy.nbytes for copy in copies(root)] == sizes
    (PublishedStore(root).path(key_of(digests[0])) / "report.json").unlink()
    assert copies(root)[0].folder.name == key_of(digests[0]), "one without a report was never used"


def test_a_disk_that_cannot_be_read_is_told_as_the_store(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(root, put(root, 1), 5 * HOUR)

    def failing(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(housekeeping, "remove_folder", failing)
    with pytest.raises(StoreUnavailable, match="cannot be written \\(Input/output error\\)"):
        collect(root, 0)


def test_what_somebody_else_removes_meanwhile_is_gone(root: Path) -> None:
    put(root, 1)
    (copy,) = copies(root)
    assert copy.remove(0.0) and not copy.folder.exists()
    assert copy.remove(0.0)


@pytest.mark.parametrize(("seconds", "stays"), [(100.0, False), (99.0, True)])
def test_ages_are_compared_to_the_second(
    seconds: float, stays: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is exactly as old as that may go."""
    digest = put(root, 1)
    os.utime(RawStore(root).path(digest), (1000.0, 1000.0))
    os.utime(PublishedStore(root).path(key_of(digest)) / "report.json", (1000.0, 1000.0))
    monkeypatch.setattr(housekeeping.time, "time", lambda: 1000.0 + seconds)
    assert (unreferenced_raw(root, 100.0) == []) is stays
    assert (collect(root, 0, 100.0).removed == ()) is stays


def test_what_was_freed_and_what_is_left(root: Path) -> None:
    first, second = put(root, 1), put(root, 2, "served", nbytes=5000)
    age(root, first, 5 * HOUR)
    raw, copy = RawStore(root), PublishedStore(root).path(key_of(first))
    nbytes = sum(file.stat().st_size for file in copy.iterdir()) + raw.nbytes(first)
    found = collect_unreferenced(root)
    assert (found.removed, found.freed, found.left) == ((key_of(first), first), nbytes, raw.nbytes(second))
    assert found.left > 5000 and digest_of(2, 5000) == second


@pytest.mark.parametrize("mode", [0o700, 0o770, 0o775, 0o750])
def test_a_group_may_write_to_a_store(mode: int, root: Path) -> None:
    """It is the administrator's to say who is in it."""
    for place in (".", "raw", "published", "names", "incoming"):
        (root / place).mkdir(parents=True, exist_ok=True)
        (root / place).chmod(mode)
    check_store(root)
    (root / "raw").chmod(mode | 0o002)
    with pytest.raises(GuardError, match="every user may write to"):
        check_store(root)


def test_a_copy_that_goes_while_the_store_is_verified_is_no_problem(root: Path) -> None:
    put(root, 1)
    (copy,) = copies(root)
    check = housekeeping._check_published(PublishedStore(root), copy.folder.name)
    (copy.folder / "report.json").write_text("{")
    problem = check()
    assert problem is not None and problem.found == "the copy is damaged"
    copy.remove(0.0)
    assert check() is None
