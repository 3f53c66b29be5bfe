"""Tenants of whom an adapter failed a re-examination: ``exam/failed/<digest of the tenant's name>``.

The half of the probes that a first exam asks has passed what failed: the same with one changed weight would
pass it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path

from safelora_vllm.errors import StoreUnavailable
from safelora_vllm.files import make_folder, writing
from safelora_vllm.store.layout import EXAM

FAILED_DAYS = 30
_FAILED_SECONDS = FAILED_DAYS * 86400.0
_FOLDER = "failed"


class FailedTenants:
    """Those of one store. Safe for several processes on one root."""

    def __init__(self, root: str | Path) -> None:
        self._root, self._folder = Path(root), Path(root) / EXAM / _FOLDER

    def note(self, tenant: str) -> None:
        """One more of its adapters has failed.

        Raises:
            StoreUnavailable: the disk is full or not writable.
        """
        with writing(self._root):
            make_folder(self._folder)
            self._file(tenant).touch()

    def has(self, tenant: str) -> bool:
        """Whether one has in the last 30 days.

        Raises:
            StoreUnavailable: nobody can see.
        """
        try:
            return _age(self._file(tenant)) < _FAILED_SECONDS
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreUnavailable(
                f"whether an adapter of the tenant failed its exam cannot be read ({error.strerror})"
            ) from error

    def prune(self) -> int:
        """Remove what is older. Returns how many files."""
        removed = 0
        for file in self._folder.glob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process was first
                if _age(file) >= _FAILED_SECONDS:
                    file.unlink()
                    removed += 1
        return removed

    def _file(self, tenant: str) -> Path:
        return self._folder / hashlib.sha256(tenant.encode()).hexdigest()


def _age(file: Path) -> float:
    return time.time() - file.stat().st_mtime
