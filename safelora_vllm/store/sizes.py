"""How large the parts of an adapter store are, counted beside everything else and at most once a minute."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

from safelora_vllm.store.layout import AUDIT, FOLDERS

PARTS = (*FOLDERS, AUDIT)
_SECONDS = 60.0


class StoreSizes:
    """root: of the store. A store that hangs leaves the last sizes as they are."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[str, int] = {}
        self._at, self._thread = -_SECONDS, None

    _thread: threading.Thread | None

    def known(self) -> dict[str, int]:
        """Bytes by part, and ``free`` of the disk, as last counted: empty before that. Returns at once."""
        if time.monotonic() - self._at >= _SECONDS and not (self._thread and self._thread.is_alive()):
            self._thread = threading.Thread(target=self.count, name="safelora-sizes", daemon=True)
            self._thread.start()
        return self._known

    def count(self) -> None:
        """Look at the files now."""
        found = {part: _bytes(self._root / part) for part in PARTS}
        with contextlib.suppress(OSError):
            status = os.statvfs(self._root)
            found["free"] = status.f_bavail * status.f_frsize
        self._known, self._at = found, time.monotonic()


def _bytes(folder: Path) -> int:
    total = 0
    for where, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # removed meanwhile
                total += os.lstat(f"{where}/{name}").st_size
    return total
