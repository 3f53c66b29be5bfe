"""What may befall a running server's disk and memory, for as long as a block lasts."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from server import Server

from tests.server.conftest import descendants


def gate_pid(server: Server) -> int:
    """The gate process among the descendants of the server."""
    return next(pid for pid, line in descendants(server.process.pid).items() if b"gate.server" in line)


@contextmanager
def limited(pid: int, limit: int, most: int) -> Iterator[None]:
    """A process with a resource limit, e.g. the largest file that it may write."""
    before = resource.prlimit(pid, limit)
    resource.prlimit(pid, limit, (most, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it did not outlive that, and has a successor without the limit
            resource.prlimit(pid, limit, before)


@contextmanager
def mounted(*command: str, at: Path) -> Iterator[None]:
    """Something mounted over a folder, where the tests may do that."""
    at.mkdir(exist_ok=True)
    if subprocess.run(["mount", *command, str(at)], capture_output=True).returncode:
        pytest.skip("mounting needs root: the other cases of this test do without")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True)


@contextmanager
def full_disk(_server: Server, store: Path) -> Iterator[None]:
    with mounted("-t", "tmpfs", "-o", "size=64k", "none", at=store / "published"):
        yield


@contextmanager
def read_only(_server: Server, store: Path) -> Iterator[None]:
    with mounted("--bind", str(store), at=store):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(store)], check=True)
        yield


@contextmanager
def no_room_for_uploads(server: Server, _store: Path) -> Iterator[None]:
    with limited(server.process.pid, resource.RLIMIT_FSIZE, 100_000):
        yield


@contextmanager
def no_room_for_copies(server: Server, _store: Path) -> Iterator[None]:
    with limited(gate_pid(server), resource.RLIMIT_FSIZE, 100_000):
        yield


@contextmanager
def not_a_folder(_server: Server, store: Path) -> Iterator[None]:
    published, aside = store / "published", store / "published.aside"
    published.rename(aside)
    published.write_text("")
    try:
        yield
    finally:
        published.unlink()
        aside.rename(published)
