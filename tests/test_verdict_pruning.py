"""Verdicts go with the copies that they are of, and exams with the servers that had them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from safelora_vllm.errors import StoreUnavailable
from safelora_vllm.store.failed_tenants import FAILED_DAYS, FailedTenants
from safelora_vllm.store.verdict_pruning import UNUSED_DAYS, mark_used, prune_verdicts, reference_file

KEPT, GONE, EXAM, FORMER = (letter * 64 for letter in "abcd")
DAY = 86400
LONG_AGO = (UNUSED_DAYS + 1) * DAY


def written(path: Path, seconds_ago: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    then = time.time() - seconds_ago
    os.utime(path, (then, then))
    return path


def verdict(root: Path, exam: str, key: str, seconds_ago: float = LONG_AGO) -> Path:
    return written(root / "exam" / "verdicts" / exam / f"{key}.json", seconds_ago)


def test_a_verdict_goes_with_its_copy(tmp_path: Path) -> None:
    (tmp_path / "published" / KEPT).mkdir(parents=True)
    stays, goes = verdict(tmp_path, EXAM, KEPT, LONG_AGO), verdict(tmp_path, EXAM, GONE)
    new = verdict(tmp_path, FORMER, GONE, 29 * DAY)  # the same content may be uploaded again
    secret = written(tmp_path / "exam" / "secret", LONG_AGO)
    assert prune_verdicts(tmp_path) == 1
    assert stays.exists() and new.exists() and secret.exists() and not goes.exists()


@pytest.mark.parametrize("marked", [False, True])
def test_an_exam_that_no_server_has_goes(tmp_path: Path, marked: bool) -> None:
    (tmp_path / "published" / KEPT).mkdir(parents=True)
    of_it, folder = verdict(tmp_path, FORMER, KEPT, LONG_AGO), tmp_path / "exam" / "verdicts" / FORMER
    reference = written(reference_file(tmp_path, FORMER), LONG_AGO)
    os.utime(folder, (0, time.time() - LONG_AGO))
    if marked:
        mark_used(tmp_path, FORMER)
    assert prune_verdicts(tmp_path) == (0 if marked else 2)
    assert of_it.exists() == reference.exists() == folder.exists() == marked


def test_a_tenant_is_forgotten_after_a_while(tmp_path: Path) -> None:
    failed = FailedTenants(tmp_path)
    assert not failed.has("acme")
    failed.note("acme")
    failed.note("../globex")  # whatever a name is, it is a file of its own in the folder
    assert failed.has("acme") and failed.has("../globex") and not failed.has("other")
    assert prune_verdicts(tmp_path) == 0
    for file in (tmp_path / "exam" / "failed").iterdir():
        os.utime(file, (0, time.time() - (FAILED_DAYS + 1) * DAY))
    failed.note("acme")  # once more
    assert failed.has("acme") and not failed.has("../globex")
    assert prune_verdicts(tmp_path) == 1 and failed.has("acme")


def test_marks_that_go_or_cannot_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = FailedTenants(tmp_path)
    failed.note("acme")
    folder = tmp_path / "exam" / "failed"
    monkeypatch.setattr(Path, "glob", lambda *_: [folder / "gone", *folder.iterdir()])
    assert failed.prune() == 0, "another process was first"
    monkeypatch.setattr(Path, "stat", _forbidden)
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        failed.has("acme")


def _forbidden(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_store_without_exams(tmp_path: Path) -> None:
    assert prune_verdicts(tmp_path) == 0
    mark_used(tmp_path, EXAM)
    assert not (tmp_path / "exam").exists()
