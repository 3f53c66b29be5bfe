"""Content-addressed folders of published adapters: ``published/<key>/`` under one root.

A folder appears whole or not at all: it is written under a temporary name and renamed. Two
processes that publish one key write the same bytes, so it does not matter whose rename comes first.
Nothing is synced to disk on the way: ``report.json`` names both files' sha256, and a copy
that a crash damaged is found by `Store.find` and made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.errors import GateUnavailable, SafeLoRAError
from safelora_vllm.report import Report

REPORT = "report.json"
_STALE_SECONDS = 3600.0
_ATTEMPTS = 5


def default_root() -> Path:
    """``$XDG_DATA_HOME/safelora-vllm``, by default ``~/.local/share/safelora-vllm``."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "safelora-vllm"


class Store:
    """Published adapters under ``root``. Safe for several processes on one root."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._published = self.root / "published"

    def path(self, key: str) -> Path:
        """The folder of a key, whether it exists or not. A key is 64 hexadecimal digits."""
        if len(key) != 64 or not set(key) <= set("0123456789abcdef"):
            raise ValueError(f"{key!r} is no key of a published adapter")
        return self._published / key

    def find(self, key: str) -> Report | None:
        """The report of a published adapter, or None where there is no undamaged copy."""
        folder = self.path(key)
        try:
            saved = json.loads((folder / REPORT).read_bytes())
            for name in (CONFIG, WEIGHTS):
                with (folder / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != saved["sha256"][name]:
                        return None
            if _digest_of(saved["report"]) != saved["report_sha256"]:
                return None
            return Report.from_dict(saved["report"])
        except (OSError, ValueError, KeyError, TypeError, SafeLoRAError):
            return None

    def publish(self, key: str, files: Mapping[str, bytes], report: Report) -> Path:
        """Put the canonical files and their report under ``key``. Replaces a damaged copy.

        Raises:
            GateUnavailable: the disk is full or not writable; nothing was published.
        """
        folder = self.path(key)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        saved: dict[str, object] = {"sha256": digests, "report": report.to_dict()}
        saved["report_sha256"] = _digest_of(saved["report"])
        contents = {**files, REPORT: json.dumps(saved, indent=1).encode()}
        temporary: str | None = None
        try:
            self._published.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = tempfile.mkdtemp(prefix=".new-", dir=self._published)
            for name, data in contents.items():
                (Path(temporary) / name).write_bytes(data)
            self._put(Path(temporary), folder, key)
        except OSError as error:
            raise GateUnavailable(
                f"the adapter store {self.root} cannot be written ({error.strerror}); free space or "
                "mend its permissions, then load the adapter again"
            ) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        return folder

    def clean(self) -> None:
        """Remove what killed processes left behind. Younger leftovers may belong to a live one."""
        for leftover in self._published.glob(".new-*"):
            with contextlib.suppress(FileNotFoundError):  # its own process finished meanwhile
                if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(leftover, ignore_errors=True)

    def _put(self, new: Path, folder: Path, key: str) -> None:
        """Rename ``new`` to ``folder``, moving a damaged copy away. Others may be at it too."""
        for attempt in range(_ATTEMPTS):
            try:
                new.rename(folder)
                return
            except OSError:
                if self.find(key) is not None:
                    return  # another process published the same bytes first
                if attempt == _ATTEMPTS - 1 or (folder.exists() and not folder.is_dir()):
                    raise
            away = Path(tempfile.mkdtemp(prefix=".new-", dir=self._published))
            with contextlib.suppress(OSError):
                folder.rename(away / "damaged")
            shutil.rmtree(away, ignore_errors=True)


def _digest_of(report: object) -> str:
    return hashlib.sha256(json.dumps(report, sort_keys=True).encode()).hexdigest()
