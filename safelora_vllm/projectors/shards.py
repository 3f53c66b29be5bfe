"""The files of a projector cache: read, and verified before their first use and whenever they change."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open
from torch import Tensor

from safelora_vllm.errors import CheckpointError, ProjectorCacheError
from safelora_vllm.files import FileState, file_state
from safelora_vllm.projectors.manifest import Manifest
from safelora_vllm.projectors.weight_files import FLOAT_DTYPES, TensorInfo, read_header


class Shards:
    """The shards of one cache."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._folder, self._shards = folder, manifest.shards
        self._verified: dict[str, FileState] = {}  # shard → of its file then
        self._headers: dict[str, tuple[FileState, dict[str, TensorInfo]]] = {}

    @property
    def tensor_bytes(self) -> int:
        """Of all tensors, as the manifest says."""
        return sum(shard.tensor_bytes for shard in self._shards.values())

    def verify(self, progress: Iterable[str] | None = None) -> None:
        """Compare every shard with the manifest's sha256.

        Raises:
            ProjectorCacheError: a shard is missing or its bytes changed.
        """
        for name in progress if progress is not None else sorted(self._shards):
            self._verify(name)

    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor, from the headers.

        Raises:
            ProjectorCacheError: a shard is missing or damaged.
        """
        found: dict[str, int] = {}
        for shard in self._shards:
            try:
                header = read_header(self._folder / shard)
            except (OSError, CheckpointError) as error:
                raise self._damaged(shard, str(error)) from error
            found |= {key: info.nbytes for key, info in header.items()}
        return found

    def read(self, key: str, shard: str, columns: int | None = None) -> Tensor:
        """A tensor in memory of its own: a mapped file that is cut short kills its readers.

        Raises:
            ProjectorCacheError: the shard is missing or its bytes changed.
        """
        try:
            if self._verified.get(shard) != file_state((self._folder / shard).stat()):
                self._verify(shard)
            with safe_open(self._folder / shard, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
                return tensor.clone() if columns is None else tensor[:, :columns].clone()
        except (OSError, SafetensorError) as error:
            raise self._damaged(shard, str(error)) from error

    def read_into(self, buffer: Tensor, key: str, shard: str) -> Tensor:
        """A tensor in the first bytes of a buffer (n,) uint8 on the CPU. The file is not mapped.

        Raises:
            ProjectorCacheError: as `read`.
        """
        try:
            with (self._folder / shard).open("rb", buffering=0) as file:
                state = file_state(os.fstat(file.fileno()))
                if self._verified.get(shard) != state:
                    self._verify(shard)
                    if self._verified[shard] != state:
                        raise OSError("it was replaced while it was read")
                info = self._header(shard)[key]
                room = buffer[: info.nbytes]
                _fill(room.numpy().data, file, info.start)
                return room.view(FLOAT_DTYPES[info.dtype]).view(info.shape)
        except (OSError, CheckpointError, KeyError) as error:
            raise self._damaged(shard, str(error)) from error

    def _header(self, shard: str) -> dict[str, TensorInfo]:
        """Of a verified shard, parsed once."""
        state = self._verified[shard]
        known = self._headers.get(shard)
        if known is None or known[0] != state:
            known = self._headers[shard] = state, read_header(self._folder / shard)
        return known[1]

    def _verify(self, name: str) -> None:
        try:
            with (self._folder / name).open("rb") as file:
                state = file_state(os.fstat(file.fileno()))
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self._damaged(name, str(error.strerror)) from error
        if found != self._shards[name].sha256:
            raise self._damaged(name, "its bytes are not those that the build wrote")
        self._verified[name] = state

    def _damaged(self, shard: str, why: str) -> ProjectorCacheError:
        return ProjectorCacheError(
            f"shard {shard} of the projector cache {self._folder} cannot be used: {why}. "
            "Restore it or build the cache again"
        )


def _fill(room: memoryview, file: BinaryIO, start: int) -> None:
    """Read until the room is full; OSError where the file ends before."""
    filled = 0
    while filled < len(room):
        count = os.preadv(file.fileno(), [room[filled:]], start + filled)
        if count == 0:
            raise OSError("it ends before its tensors do")
        filled += count
