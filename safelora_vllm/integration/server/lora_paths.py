"""What ``lora_path`` of vLLM's own call names: a folder or archive of this machine, or a hub repository."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safelora_vllm.adapters.beside import SIGNATURE, SIGNATURE_BYTES
from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.errors import Forbidden, UsageError
from safelora_vllm.integration.server.uploads import HUB_ID, TooLarge, downloaded, incoming

if TYPE_CHECKING:
    from safelora_vllm.integration.server.changes import Manager

_FOLLOW = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


def is_hub_id(path: str) -> bool:
    """Whether a ``lora_path`` names a hub repository, and nothing of this machine."""
    return bool(HUB_ID.fullmatch(path)) and not Path(path).exists()


@asynccontextmanager
async def adapter_at(managed: Manager, path: str) -> AsyncIterator[Path]:
    """What the gate is to read.

    A hub id is downloaded, where the operator allows that. Links of a Hugging Face cache's snapshot are
    followed into its own blobs, inside of the allowed folders, and what they lead to is copied: the gate
    itself follows none.

    Raises:
        UsageError: no path, or the download failed. Forbidden: outside of the folders that the operator
        allows, or a hub id without ``--allow-hub``. TooLarge: larger than an upload may be.
    """
    root, most = managed.reconciler.names.root, managed.max_adapter_bytes
    if await asyncio.to_thread(is_hub_id, path):
        if not managed.hub:
            raise Forbidden(
                f"{path!r} is a hub id, no folder of this machine: start the server with --allow-hub, or "
                f"download it with 'hf download {path} --local-dir DIR' and load DIR"
            )
        async with incoming(root) as folder:
            yield await downloaded(path, None, folder, most, True)
        return
    source = await asyncio.to_thread(managed.check_root, path)
    links = await asyncio.to_thread(_links, source)
    if not links or not managed.roots or source.parent.name != "snapshots":
        yield source
        return
    async with incoming(root) as folder:
        for name in (CONFIG, WEIGHTS):
            await asyncio.to_thread(_copy, source / name, folder / name, managed.roots, most)
        if await asyncio.to_thread(os.path.lexists, source / SIGNATURE):
            signature = source / SIGNATURE, folder / SIGNATURE
            await asyncio.to_thread(_copy, *signature, managed.roots, SIGNATURE_BYTES)
        yield folder


def _links(source: Path) -> list[str]:
    """Which of both files of an adapter's folder are links."""
    try:
        return [name for name in (CONFIG, WEIGHTS) if (source / name).is_symlink()]
    except OSError as error:  # too long a name, or a folder that may not be entered
        raise UsageError(f"{source} cannot be read: {error.strerror}") from error


def _copy(source: Path, target: Path, roots: Sequence[Path], most: int) -> None:
    """Copy the file that a link leads to. Where it led is asked of the open file, so nobody can change it."""
    try:
        descriptor = os.open(source, _FOLLOW)
    except FileNotFoundError as error:
        raise UsageError(f"{source} is missing, or a link to nothing: download the adapter again") from error
    except OSError as error:
        raise UsageError(f"{source} cannot be opened: {error.strerror}") from error
    try:
        found, status = Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor)
        allowed = any(found.is_relative_to(root) for root in roots)
        if not allowed or (source.is_symlink() and found.parent != source.parents[2] / "blobs"):
            raise Forbidden(
                f"{source} is a link that leads outside of its blobs, or of the --adapter-root folders"
            )
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{source} does not lead to a regular file")
        if status.st_size > most:
            raise TooLarge(f"{source.name} has {status.st_size:,} bytes; this server accepts {most:,}")
        with os.fdopen(descriptor, "rb", closefd=False) as opened, target.open("xb") as written:
            shutil.copyfileobj(opened, written, 1024 * 1024)
    finally:
        os.close(descriptor)
