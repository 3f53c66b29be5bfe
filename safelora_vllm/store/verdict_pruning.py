"""Removing what exams found of copies that are gone, and what former exams found."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from safelora_vllm.files import digests_in, remove_folder, writing
from safelora_vllm.store.failed_tenants import FailedTenants
from safelora_vllm.store.layout import EXAM, PUBLISHED

VERDICTS = "verdicts"
# After which a former exam goes, and what was found of a copy that is gone. Not sooner: a copy that failed
# comes back byte for byte where its author uploads the same content again.
UNUSED_DAYS = 30
_UNUSED_SECONDS = UNUSED_DAYS * 86400.0


def reference_file(root: Path, exam: str) -> Path:
    """The aligned model's answers in an exam. When it was written is when the exam was used last."""
    return root / EXAM / f"reference-{exam}.json"


def mark_used(root: Path, exam: str) -> None:
    """Note that a server still has an exam. Without a store, it is examined again sooner, no more."""
    with contextlib.suppress(OSError):
        os.utime(reference_file(root, exam))


def prune_verdicts(root: str | Path) -> int:
    """Remove verdicts of 30 days whose copies are not published any more, and exams unused for 30 days.

    And after 30 days the note that a tenant's adapter failed.

    Returns how many files and folders went.

    Raises:
        StoreUnavailable: the store cannot be written.
    """
    root, removed = Path(root), 0
    published = set(digests_in(root / PUBLISHED))
    with writing(root):
        for exam in digests_in(root / EXAM / VERDICTS):
            folder = root / EXAM / VERDICTS / exam
            if _age(folder) >= _UNUSED_SECONDS and _age(reference_file(root, exam)) >= _UNUSED_SECONDS:
                remove_folder(folder)
                removed += 1
                continue
            for file in folder.glob("*.json"):
                if file.stem not in published and _age(file) >= _UNUSED_SECONDS:
                    file.unlink(missing_ok=True)
                    removed += 1
        for file in (root / EXAM).glob("reference-*.json"):
            if _age(file) >= _UNUSED_SECONDS:
                file.unlink(missing_ok=True)
                removed += 1
        removed += FailedTenants(root).prune()
    return removed


def _age(path: Path) -> float:
    """Seconds since it was written; very many where it is not there."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
