"""Whether a file is still the one that was read, without reading it again."""

from __future__ import annotations

import os

FileState = tuple[int, int, int, int]


def file_state(status: os.stat_result) -> FileState:
    """mtime and ctime in ns, size and inode: as long as they stay, what the file held is taken to hold."""
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino
