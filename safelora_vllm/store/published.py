"""Content-addressed folders of published adapters: ``published/<key>/`` under one root.

A folder appears whole or not at all: it is written under a temporary name and renamed. Two
processes that publish one key write the same bytes, so it does not matter whose rename comes first.
Nothing is synced to disk on the way: ``report.json`` names both files' sha256, and a copy
that a crash damaged is found by `PublishedStore.find` and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.errors import SafeLoRAError
from safelora_vllm.files import (
    FileState,
    FoundSound,
    digests_in,
    is_digest,
    make_folder,
    put_folder,
    replace_file,
    sha256_of,
    states,
    temporary_folder,
    write_file,
    writing,
)
from safelora_vllm.report import Report
from safelora_vllm.store.layout import PUBLISHED

REPORT = "report.json"
_OVERRIDE = "override"  # in it, beside the report
_NOT_OURS = (OSError, ValueError, KeyError, TypeError, SafeLoRAError)


class PublishedStore:
    """Published adapters under ``root``. Safe for several processes on one root."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._published = self.root / PUBLISHED
        self._sound = FoundSound()

    def path(self, key: str) -> Path:
        """The folder of a key, whether it exists or not. A key is 64 hexadecimal digits."""
        if not is_digest(key):
            raise ValueError(f"{key!r} is no key of a published adapter")
        return self._published / key

    def files(self, key: str) -> list[Path]:
        """What a copy serves, whether it exists or not: its config and its weights."""
        return [self.path(key) / name for name in (CONFIG, WEIGHTS)]

    def find(self, key: str, again: bool = False) -> Report | None:
        """The report of a published adapter, or None where there is no undamaged copy.

        A copy that this object has read is read again only when its files changed, or ``again`` is set.
        """
        files = self.files(key)
        if again:
            self._sound.forget(key)
        try:
            saved = self._saved(key)
            if not self._sound.has(key, files):
                found, expected = states(files), saved["sha256"]
                if any(sha256_of(file).hex() != expected[file.name] for file in files):
                    return None
                self._sound.add(key, found)
            return _report_in(saved)
        except _NOT_OURS:
            return None

    def forget(self, key: str) -> None:
        """A copy could not be used: it is read again before it is found."""
        self._sound.forget(key)

    def state(self, key: str) -> tuple[FileState, ...]:
        """Of both files: as long as they stay, a copy that was sound is sound.

        Raises:
            OSError: a file is missing.
        """
        return states(self.files(key))

    def report(self, key: str) -> Report | None:
        """As `find`, but without reading the weights: whether they are sound is not known."""
        try:
            return _report_in(self._saved(key))
        except _NOT_OURS:
            return None

    def publish(self, key: str, files: Mapping[str, bytes], report: Report) -> Path:
        """Put the canonical files and their report under ``key``. Replaces a damaged copy.

        Raises:
            StoreUnavailable: the disk is full or not writable; nothing was published.
        """
        folder = self.path(key)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        saved: dict[str, object] = {"sha256": digests, "report": report.to_dict()}
        saved["report_sha256"] = _digest_of(saved["report"])
        contents = {**files, REPORT: json.dumps(saved, indent=1).encode()}
        with writing(self.root):
            make_folder(self._published)
            with temporary_folder(self._published) as new:
                for name, data in contents.items():
                    write_file(new / name, data, durable=False)
                put_folder(new, folder, intact=lambda: self.find(key) is not None)
        return folder

    def has_override(self, key: str) -> bool:
        """Whether an admin's override asked for this copy: its policy may be less strict than the server's.

        A copy that an older release made does not say so, until the gate is asked for it again.
        """
        try:
            return self._saved(key)[_OVERRIDE] is True
        except _NOT_OURS:
            return False

    def mark_override(self, key: str) -> None:
        """Note that an admin's override asked for this copy. For the gate: workers believe it.

        Raises:
            StoreUnavailable: the copy is gone, or the disk is full or not writable.
        """
        if self.has_override(key):
            return
        with writing(self.root):
            saved = {**self._saved(key), _OVERRIDE: True}
            replace_file(self.path(key) / REPORT, json.dumps(saved, indent=1).encode())

    def digests(self, key: str) -> dict[str, str] | None:
        """File name → sha256 of a copy's files, as its report has them; None where there is no copy."""
        try:
            return {name: str(digest) for name, digest in self._saved(key)["sha256"].items()}
        except (*_NOT_OURS, AttributeError):
            return None

    def touch(self, key: str) -> None:
        """Mark a copy as used now: the least recently used ones are removed first."""
        with contextlib.suppress(OSError):  # without the mark it is made again sooner, no more
            os.utime(self.path(key) / REPORT)

    def all(self) -> list[str]:
        """The keys that have a folder, sound or not."""
        return digests_in(self._published)

    def _saved(self, key: str) -> Any:
        """What a copy's ``report.json`` holds."""
        return json.loads((self.path(key) / REPORT).read_bytes())


def _report_in(saved: Any) -> Report | None:
    """The report of a copy, or None where it is damaged. Raises one of `_NOT_OURS` where it has none."""
    intact = _digest_of(saved["report"]) == saved["report_sha256"]
    return Report.from_dict(saved["report"]) if intact else None


def _digest_of(report: object) -> str:
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()
