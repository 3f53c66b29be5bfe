"""Which content is served under a name: ``names/<quoted name>.json``, one record a name.

A change is one rename in that folder, on the disk before it is reported as done.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from safelora_vllm.errors import StoreDamaged, StoreUnavailable, UsageError
from safelora_vllm.files import FileState, file_state, locked, make_folder, replace_file, sync_folder, writing
from safelora_vllm.store.layout import IDS, NAMES
from safelora_vllm.store.name_record import SUFFIX, AdapterRecord, Version, file_of, from_json, to_json

logger = logging.getLogger("vllm.safelora.store")
REMEDY = "restore it from a backup, or delete it and upload the adapter again"
# As long as a file is younger than this, a second write may leave it with the same mtime.
_YOUNG_NS = 100_000_000
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
# vLLM's ids of adapters are 32 bits in its second model runner, and its own counter starts at 1.
FIRST_ID, LAST_ID = 2**20, 2**31 - 1
_DIGITS = 20  # and more are no number of an adapter: Python reads no number of thousands
_TRANSIENT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_CURE = "restore it from a backup, or start with a new store"


def number_in(text: bytes, where: str | Path) -> int:
    """The first number that nobody was given, from the file that says so.

    Raises:
        StoreDamaged: it holds another thing.
    """
    if len(text) > _DIGITS or not text.strip().isdigit() or not FIRST_ID <= (number := int(text)) <= LAST_ID:
        raise StoreDamaged(f"{where} holds no number; {_CURE}")
    return number


class NameStore:
    """Records under ``root``. Safe for several threads, and for several processes on one root.

    folder: where they lie, for those who watch it. is_mirror: of a bucket, into which `look` has to look.
    is_out: the bucket did not answer the last look.
    """

    is_mirror = False
    is_out = False

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.folder = self.root / NAMES
        self._seen: dict[str, _Seen] = {}

    def get(self, name: str) -> AdapterRecord | None:
        """The record of a name, None where there is none.

        Raises:
            StoreDamaged: its file is damaged or not ours.
            StoreUnavailable: it cannot be read now.
        """
        try:
            file = file_of(name)
        except UsageError:
            return None  # nothing was ever stored under it
        found = self._read(file)
        if found is not None and found.wrong:
            raise StoreDamaged(f"{self.folder / file} is {found.wrong}; {REMEDY}")
        return found.record if found else None

    def newest(self, name: str) -> AdapterRecord | None:
        """`get`, with what other servers have written: a change begins from it. It may take long.

        Raises:
            StoreDamaged, StoreUnavailable: see there.
        """
        return self.get(name)

    def all(self) -> dict[str, AdapterRecord]:
        """All sound records by name. Damaged ones are logged, once each, and left out.

        Cheap when nothing changed: only files that did are read.

        Raises:
            StoreUnavailable: the folder cannot be read now.
        """
        self._scan()
        return {seen.record.name: seen.record for seen in self._seen.values() if seen.record}

    def damaged(self) -> dict[Path, str]:
        """The files that `all` leaves out, with what is wrong with them."""
        self._scan()
        return {self.folder / file: seen.wrong for file, seen in self._seen.items() if seen.wrong}

    def update(
        self,
        name: str,
        change: Callable[[AdapterRecord | None], AdapterRecord | None],
        around: Callable[[str, AdapterRecord | None], AbstractContextManager[None]] | None = None,
    ) -> AdapterRecord | None:
        """Replace a record by ``change`` of it, or remove it where that is None. One at a time.

        Args:
            name: of the adapter.
            change: gets the record as it is, None where there is none, and gives what it shall be.
            around: done under the lock before and after the file is written. It gets the file's digest
                and the new record.

        Raises:
            UsageError: the name is empty or too long for a file.
            StoreDamaged: the present record is damaged; it stays.
            StoreUnavailable: the disk is full or not writable. The old record stays, unless the disk
                failed after the new one was in its place.
        """
        path = self.folder / file_of(name)
        with contextlib.ExitStack() as lock:
            with writing(self.root):
                make_folder(self.folder)
                lock.enter_context(locked(self.folder))
            before = self.get(name)
            after = change(before)
            if after == before:
                return after
            with around(self.file_digest(name), after) if around else nullcontext(), writing(self.root):
                if after:
                    replace_file(path, to_json(after, path.name))
                else:
                    path.unlink()
                    sync_folder(self.folder)
        return after

    def file_digest(self, name: str) -> str:
        """The sha256 of a record's file; empty where there is none.

        Raises:
            StoreUnavailable: it cannot be read now.
        """
        path = self.folder / file_of(name)
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise _unreadable(path, error) from error

    def reserve_ids(self, count: int) -> int:
        """The first of ``count`` numbers that nobody on this store was given before or will be again.

        Raises:
            StoreDamaged: it is not known which were given.
            StoreUnavailable: the disk is full or not writable, or the numbers are used up.
        """
        path = self.root / IDS
        with writing(self.root):
            make_folder(self.root)
            with locked(self.root):
                first = self.next_id()
                if first + count > LAST_ID:
                    raise StoreUnavailable(f"{path}: all adapter ids are used up; start with a new store")
                replace_file(path, str(first + count).encode())
        return first

    def next_id(self) -> int:
        """The first number that nobody was given.

        Raises:
            StoreDamaged: the file that says so is damaged, or missing in a store with names. Numbers that
                start again would be given twice.
        """
        path = self.root / IDS
        try:
            return number_in(path.read_bytes(), path)
        except FileNotFoundError:
            if any(self.folder.glob("*.json")):
                raise StoreDamaged(f"{path} is missing, but the store has names; {_CURE}") from None
            return FIRST_ID

    def stamp(self) -> int:
        """The folder's st_mtime_ns, 0 where there is none: another number after every change.

        On one machine, that is; network file systems keep it for seconds. And the kernel's clock for
        files has steps of some milliseconds: two changes within one leave the same stamp, so scan
        again as long as the stamp is younger than that.
        """
        try:
            return self.folder.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def look(self) -> None:
        """Take over what other stores wrote into the bucket, if there is one. It may take long."""

    def _scan(self) -> None:
        """Bring what was seen up to date."""
        before, now, after = self._seen, time.time_ns(), {}
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if not entry.name.endswith(SUFFIX):
                        continue
                    seen = before.get(entry.name)
                    if seen is None or not seen.still(entry, now):
                        seen = self._read(entry.name)
                    if seen is not None:
                        after[entry.name] = seen
        except FileNotFoundError:
            pass
        except OSError as error:
            raise _unreadable(self.folder, error) from error
        for file, seen in after.items():
            if seen.wrong and not (file in before and before[file].state == seen.state):
                logger.error("%s is %s; %s", self.folder / file, seen.wrong, REMEDY)
        self._seen = after

    def _read(self, file: str) -> _Seen | None:
        """A record's file, None where there is none."""
        path = self.folder / file
        try:
            with os.fdopen(os.open(path, _FLAGS), "rb") as stream:
                state = file_state(os.fstat(stream.fileno()))
                text = stream.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in _TRANSIENT:  # no fault of this file, and no reason to stop serving it
                raise _unreadable(path, error) from error
            return _Seen(None, None, f"a file that cannot be read ({error.strerror})")
        try:
            return _Seen(state, from_json(text, file))
        except (ValueError, KeyError, TypeError, RecursionError, UsageError) as error:
            return _Seen(state, None, f"no record of a name ({type(error).__name__}: {error})")


@dataclass(frozen=True)
class _Seen:
    """What a file held in this state (None: it could not be read): a record, or what is wrong with it."""

    state: FileState | None
    record: AdapterRecord | None
    wrong: str = ""

    def still(self, entry: os.DirEntry[str], now: int) -> bool:
        """Whether the file is the same. A young one may have changed without showing it."""
        try:
            found = file_state(entry.stat(follow_symlinks=False))
        except FileNotFoundError:
            return False
        return found == self.state and now - found[0] > _YOUNG_NS


def _unreadable(path: Path, error: OSError) -> StoreUnavailable:
    return StoreUnavailable(f"{path} cannot be read now ({error.strerror}); try again")


__all__ = ["AdapterRecord", "NameStore", "Version"]
