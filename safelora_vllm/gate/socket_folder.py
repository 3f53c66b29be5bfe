"""The folder in which the gate of a host listens. Workers and API servers of one vLLM instance share it.

Whoever holds the lock in it owns the gate. vLLM may kill its workers and the gate without a word, so
the folder is removed by whoever is left: the gate, the API server, or the next server that starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from pathlib import Path
from typing import IO

from safelora_vllm.errors import GuardError

SOCKET = "gate.sock"
TRAFFIC = "traffic-*"  # files of API servers, see `integration.server.traffic`
EXAMS = "exams-*.json"  # the same, see `integration.server.exam.counts`
_LOCK = "owner.lock"
_POLL_SECONDS = 0.05
_STARTING_SECONDS = 60.0  # a worker has long taken its lock then


def private_folder(instance: str) -> Path:
    """The folder of a vLLM instance, which only this user can enter.

    Raises:
        GuardError: somebody else made a folder of that name.
    """
    folder = Path(tempfile.gettempdir()) / f"{_prefix()}{instance}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_private(folder):
        raise GuardError(f"{folder} is open to other users; remove it and start again")
    return folder


def take_ownership(folder: Path) -> IO[str] | None:
    """The lock, for as long as it is open; None where another process has it."""
    file = (folder / _LOCK).open("w")
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    file.close()
    return None


def remove(folder: Path) -> None:
    """Remove the folder, whoever owned it."""
    with contextlib.suppress(OSError):
        for path in (folder / SOCKET, folder / _LOCK, *_of_servers(folder)):
            path.unlink(missing_ok=True)
        folder.rmdir()


def remove_unowned(folder: Path, patience: float = 0.0) -> None:
    """Remove the folder, unless the process that owns its gate lives.

    patience: seconds that it may take to end. One that was killed frees its memory before its locks.
    """
    deadline = time.monotonic() + patience
    with contextlib.suppress(OSError):
        while folder.is_dir():
            if (lock := take_ownership(folder)) is not None:
                with lock:
                    remove(folder)
                return
            if time.monotonic() >= deadline:
                return
            time.sleep(_POLL_SECONDS)


def remove_leftovers() -> None:
    """Remove the folders of this user's instances that have ended. One that is new may be starting."""
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{_prefix()}*"):
            if _is_private(folder) and time.time() - folder.stat().st_mtime > _STARTING_SECONDS:
                remove_unowned(folder)


def _of_servers(folder: Path) -> list[Path]:
    """What API servers leave there, also what they were just writing."""
    return [path for pattern in (TRAFFIC, EXAMS, f".{EXAMS}") for path in folder.glob(pattern)]


def _prefix() -> str:
    return f"safelora-{os.getuid()}-"


def _is_private(folder: Path) -> bool:
    status = folder.lstat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o077 and not folder.is_symlink()
