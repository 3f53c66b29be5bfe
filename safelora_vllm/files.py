"""Writing files and folders whole or not at all, one writer at a time where it matters; file states.

What is being written or removed has a name that begins with ``.new-``; a killed process leaves at
most such a leftover. Files have mode 0600, folders 0700.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safelora_vllm.errors import StoreUnavailable, UsageError

STALE_SECONDS = 3600.0
_TEMPORARY = ".new-"
_ATTEMPTS = 5
_REMEMBERED = 10_000
_SETTLED_NS = 50_000_000
FileState = tuple[int, int, int, int]


def file_state(status: os.stat_result) -> FileState:
    """mtime and ctime in ns, size and inode: as long as they stay, what the file held is taken to hold."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


def settled(stamp: int) -> int:
    """A folder's mtime in ns, or -1 while a second change may leave it as it is.

    A time stamp is as coarse as the kernel's clock tick.
    """
    return stamp if time.time_ns() - stamp > _SETTLED_NS else -1


class FoundSound:
    """What was read and found sound, by key: it is taken to be so as long as its files' states stay."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[FileState, ...]] = {}

    def has(self, key: str, paths: Iterable[Path]) -> bool:
        """Whether it was sound, and its files have not changed since. False where one is missing."""
        try:
            return self._states.get(key) == states(paths)
        except OSError:
            return False

    def forget(self, key: str) -> None:
        """It has to be read again: what a disk has lost does not show in its files' states."""
        self._states.pop(key, None)

    def add(self, key: str, found: tuple[FileState, ...]) -> None:
        """It is sound. found: its files' states from before they were read."""
        if len(self._states) >= _REMEMBERED:
            self._states.clear()
        self._states[key] = found


def states(paths: Iterable[Path]) -> tuple[FileState, ...]:
    """Of several files.

    Raises:
        OSError: one is missing.
    """
    return tuple(file_state(path.stat()) for path in paths)


def sha256_of(path: Path) -> bytes:
    """A file's sha256.

    Raises:
        OSError: it is missing, or cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def is_digest(text: str) -> bool:
    """Whether a text is a sha256 in hexadecimal: the names of raw and published folders."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def digests_in(folder: Path) -> list[str]:
    """The raw or published folders in ``folder``, by name. None where there is no such folder."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(path.name for path in folder.iterdir() if is_digest(path.name))
    return []


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """Turn what the operating system says about a full or read-only disk into `StoreUnavailable`."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"the adapter store {root} cannot be written ({error.strerror or error}); free space or fix "
            "its permissions, then try again"
        ) from error


def not_written(error: OSError) -> StoreUnavailable:
    """What a caller is told whose adapter cannot be received."""
    return StoreUnavailable(f"the adapter store cannot be written ({error.strerror}); try again later")


def check_new(out: Path) -> None:
    """Raise UsageError where ``out`` exists."""
    if out.exists():
        raise UsageError(f"{out} exists: remove it, or give another folder as `out`")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, alone among all processes and threads. It ends with its process."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):  # not by closing alone: a forked child may hold it open
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextlib.contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Hold a lock file unless another process does; gives whether it is held. It ends with its process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        with contextlib.suppress(OSError):  # not by closing alone: a forked child may hold it open
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """The folder and its missing parents, each of them durable."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries, that is, the renames in it, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes, durable: bool) -> None:
    """A new file, not atomic: for folders that are not yet in their place."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    _write(descriptor, data, durable)


def replace_file(path: Path, data: bytes) -> None:
    """A durable file in the place of an old one, if any. Readers see either whole."""
    descriptor, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
    try:
        _write(descriptor, data, durable=True)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _write(descriptor: int, data: bytes, durable: bool) -> None:
    """Write all and close. The system may take less than it is given, at most 2 GiB at once."""
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder to be filled and then put in its place; whatever is left of it is removed."""
    folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_folder(new: Path, folder: Path, intact: Callable[[], bool]) -> None:
    """Rename ``new`` to ``folder``, moving a damaged one away. Others may be at it too."""
    for attempt in range(_ATTEMPTS):
        try:
            new.rename(folder)
            return
        except OSError:
            if intact():
                return  # another process put the same bytes there first
            if attempt == _ATTEMPTS - 1 or (folder.exists() and not folder.is_dir()):
                raise
        with contextlib.suppress(OSError):
            remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Rename a folder away, then delete it: no reader sees half of it. Needs no space on the disk."""
    away = folder.with_name(_TEMPORARY + secrets.token_hex(8))
    with contextlib.suppress(FileNotFoundError):
        folder.rename(away)
        shutil.rmtree(away, ignore_errors=True)


def leftovers(folder: Path, older_than: float, everything: bool = False) -> list[Path]:
    """Temporary files and folders that nobody has written to for ``older_than`` seconds.

    Younger ones may belong to a live process. everything: whatever the names in the folder are.
    """
    found = []
    with contextlib.suppress(FileNotFoundError):
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # its own process finished meanwhile
                if (everything or _is_temporary(path)) and time.time() - _last_written(path) > older_than:
                    found.append(path)
    return sorted(found)


def remove_leftovers(folder: Path, older_than: float = STALE_SECONDS, everything: bool = False) -> None:
    """Remove what killed processes left behind."""
    for path in leftovers(folder, older_than, everything):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def _is_temporary(path: Path) -> bool:
    """Whether a name is one of this module's. Records end in ``.json``, so no adapter's name is."""
    return path.name.startswith(_TEMPORARY) and path.suffix != ".json"


def _last_written(path: Path) -> float:
    """Newest mtime of a path and, for a folder, of all that lies in it: a file that grows is in use."""
    return max(found.stat().st_mtime for found in [path, *path.rglob("*")])
