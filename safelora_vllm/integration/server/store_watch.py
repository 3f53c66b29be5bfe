"""Whether another process has changed the store's names, without a call to the store's file system."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from inotify_simple import INotify, flags

logger = logging.getLogger("vllm.safelora.watch")
_CHANGES = flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE | flags.CREATE | flags.CLOSE_WRITE
_ENOUGH = 1 << 16  # bytes of events that are read at once


class StoreWatch:
    """A queue of the kernel's to which each change of a folder on this machine adds, before it returns.

    So a change that was answered is in the queue of every API server on the machine, and asking the queue
    cannot hang, whatever becomes of the folder's disk. Changes that other machines make are not in it.
    """

    def __init__(self, folder: Path) -> None:
        self._queue: INotify | None = None
        try:
            self._queue = INotify(nonblocking=True)
            self._queue.add_watch(folder, _CHANGES)
        except OSError as error:
            self.close()
            logger.warning(
                "%s cannot be watched (%s): changes by other API servers are seen within 2 s. Raise "
                "fs.inotify.max_user_instances and fs.inotify.max_user_watches",
                folder, error.strerror,
            )  # fmt: skip

    def changed(self) -> bool:
        """Whether anything changed since the last call."""
        if self._queue is None:
            return False
        try:
            return bool(os.read(self._queue.fileno(), _ENOUGH))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Stop watching."""
        if self._queue is not None:
            self._queue.close()
        self._queue = None
