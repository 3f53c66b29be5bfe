"""What tenants uploaded and the gate accepted: ``raw/<digest>/``, the only copy that we have of it.

A folder appears whole or not at all, and is on the disk before `RawStore.keep` returns. From it the
published copies can be made again, for another policy, projector cache or version of this package.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

from safelora_vllm.adapters.read import CONFIG, WEIGHTS, joined_digest
from safelora_vllm.files import (
    FileState,
    FoundSound,
    digests_in,
    is_digest,
    locked,
    make_folder,
    put_folder,
    remove_folder,
    sha256_of,
    states,
    sync_folder,
    temporary_folder,
    write_file,
    writing,
)
from safelora_vllm.store.layout import RAW


class RawStore:
    """Uploaded adapters under ``root``. Safe for several processes on one root."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._raw = self.root / RAW
        self._sound = FoundSound()

    def path(self, digest: str) -> Path:
        """The folder of a digest, whether it exists or not. A digest is 64 hexadecimal digits."""
        if not is_digest(digest):
            raise ValueError(f"{digest!r} is no digest of an adapter")
        return self._raw / digest

    def has(self, digest: str) -> bool:
        """Whether both files are there. `damaged` reads them too."""
        folder = self.path(digest)
        return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()

    def keep(self, digest: str, files: Mapping[str, bytes]) -> None:
        """Put both files under their digest. An intact copy stays and counts as new; a damaged one goes.

        digest: of these files, as whoever read them has found it. It is not computed again.

        Raises:
            StoreUnavailable: the disk is full or not writable; nothing was kept.
            ValueError: these are not the two files of an adapter.
        """
        folder = self.path(digest)
        if set(files) != {CONFIG, WEIGHTS}:
            raise ValueError(f"{sorted(files)} are not the two files of an adapter")
        with writing(self.root):
            if self.damaged(digest) is None and self._keep_longer(folder):
                return
            make_folder(self._raw)
            with temporary_folder(self._raw) as new:
                for name, data in files.items():
                    write_file(new / name, data, durable=True)
                sync_folder(new)
                with locked(self._raw):
                    put_folder(new, folder, intact=lambda: self.damaged(digest) is None)
            sync_folder(self._raw)

    def nbytes(self, digest: str) -> int:
        """Size of both files, 0 where there are none."""
        folder, total = self.path(digest), 0
        for name in (CONFIG, WEIGHTS):
            with contextlib.suppress(FileNotFoundError):
                total += (folder / name).stat().st_size
        return total

    def damaged(self, digest: str, again: bool = False) -> str | None:
        """What is wrong with a copy, None for a sound one.

        Reads it all, but one that this object has read only when its files changed, or ``again`` is set.
        """
        files = [self.path(digest) / name for name in (CONFIG, WEIGHTS)]
        if again:
            self._sound.forget(digest)
        if self._sound.has(digest, files):
            return None
        before: tuple[FileState, ...] = ()
        sides = []
        for file in files:
            try:
                before += states([file])
                sides.append(sha256_of(file))
            except FileNotFoundError:
                return f"{file.name} is missing"
            except OSError as error:
                return f"{file.name} cannot be read ({error.strerror})"
        found = joined_digest(*sides)
        if found != digest:
            return f"its content has the digest {found}"
        self._sound.add(digest, before)
        return None

    def remove(self, digest: str, min_age_seconds: float = 0.0) -> bool:
        """Remove a copy, unless it was kept less than ``min_age_seconds`` ago. Whether it is gone.

        Raises:
            StoreUnavailable: the disk is not writable.
        """
        folder = self.path(digest)
        with writing(self.root), contextlib.suppress(FileNotFoundError), locked(self._raw):
            if time.time() - folder.stat().st_mtime < min_age_seconds:
                return False
            remove_folder(folder)
        return True

    def all(self) -> list[str]:
        """The digests that have a folder, sound or not."""
        return digests_in(self._raw)

    def _keep_longer(self, folder: Path) -> bool:
        """Make a copy as young as a new one, so that its name can be written before it is removed."""
        with contextlib.suppress(FileNotFoundError), locked(self._raw):
            os.utime(folder)
            sync_folder(self._raw)  # whoever renamed it may have been killed before that
            return True
        return False
