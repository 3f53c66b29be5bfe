"""Reading a model's safetensors checkpoint one tensor at a time, without ever holding the model.

Tensors are read with plain file reads, not memory maps: a map's pages count as the process's
memory until the kernel takes them back, a buffer is gone when its tensor is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelora_vllm.errors import CheckpointError
from safelora_vllm.safetensors_header import LONGEST_SIGN, other_format

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
FLOAT_DTYPES |= {"BF16": torch.bfloat16}
_MAX_HEADER = 100 * 1024 * 1024
_SAMPLES, _SAMPLE_BYTES = 8, 256
_PIECE = 8 * 1024 * 1024


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file, dtype as safetensors names it, shape, first byte, length."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def locate_model(model: str | Path) -> Path:
    """The folder of a model given as a folder or as a hub id (``org/name``, or ``org/name@rev``).

    Raises:
        CheckpointError: neither a folder nor a model that the hub or its local cache has.
    """
    path = Path(model)
    if path.is_dir():
        return path
    name, _, revision = str(model).partition("@")
    if path.is_absolute() or name.count("/") > 1 or name.startswith("."):
        raise CheckpointError(f"{model} is not a folder: expected a model folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub client's errors have no common base class
        raise CheckpointError(
            f"{model} is not a folder, and it could not be downloaded from the hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); give a model folder or an id that can be downloaded"
        ) from error


@dataclass(frozen=True)
class ModelName:
    """How a model is named where PEFT and transformers find it. revision: of a hub id; None for a folder."""

    name: str
    revision: str | None = None

    @classmethod
    def of(cls, model: str | Path) -> ModelName:
        """The absolute path of a folder, or a hub id without its ``@revision``."""
        if model != "" and Path(model).is_dir():  # Path("") is the current folder
            return cls(str(Path(model).resolve()))
        name, _, revision = str(model).partition("@")
        return cls(name, revision or None)


class Checkpoint:
    """A folder with ``model.safetensors`` or shards, and ``config.json``.

    whole: whether files have to have their data. Without it they may end after their headers.

    Raises:
        CheckpointError: no safetensors files, a broken header, or a tensor in two shards.
    """

    def __init__(self, model: str | Path, whole: bool = True) -> None:
        self.folder = locate_model(model)
        self.tensors: dict[str, TensorInfo] = {}
        for file in _weight_files(self.folder):
            for name, info in read_header(file, whole).items():
                if name in self.tensors:
                    raise CheckpointError(f"{self.folder}: {name} is in two files")
                self.tensors[name] = info

    @property
    def config(self) -> dict[str, Any]:
        """The model's ``config.json``; empty where there is none."""
        path = self.folder / "config.json"
        try:
            return dict(json.loads(path.read_text())) if path.is_file() else {}
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON ({error}); download it again") from error

    def raw(self, name: str) -> bytearray:
        """A tensor's bytes."""
        info = self.tensors[name]
        buffer = bytearray(info.nbytes)
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start)
            view, done = memoryview(buffer), 0
            while done < info.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{info.file} ends inside {name}; download it again")
                done += count
        return buffer

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype.

        Raises:
            CheckpointError: no such tensor, or a dtype that is not a plain float (a quantised
                checkpoint: use the original one).
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        dtype = self.float_dtype(name)
        flat = torch.frombuffer(self.raw(name), dtype=dtype)
        return flat.reshape(self.tensors[name].shape)

    def float_dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor that is there; see `read` for what it raises."""
        info = self.tensors[name]
        if info.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{name} in {self.folder} is {info.dtype}; expected one of {list(FLOAT_DTYPES)}. "
                "Give the unquantised checkpoint"
            )
        return FLOAT_DTYPES[info.dtype]

    def digest(self, progress: Iterable[str] | None = None) -> str:
        """sha256 over every tensor's name, dtype, shape and bytes: the checkpoint's full identity.

        ``progress`` may wrap ``sorted(self.tensors)`` in a progress bar.
        """
        total = hashlib.sha256()
        for name in progress if progress is not None else sorted(self.tensors):
            total.update(self._label(name))
            total.update(self._sha256(name))
        return total.hexdigest()

    def _sha256(self, name: str) -> bytes:
        """Of a tensor's bytes, of which only a piece is held."""
        info, digest = self.tensors[name], hashlib.sha256()
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start)
            left, piece = info.nbytes, memoryview(bytearray(min(info.nbytes, _PIECE)))
            while left:
                count = file.readinto(piece[:left])
                if not count:
                    raise CheckpointError(f"{info.file} ends inside {name}; download it again")
                digest.update(piece[:count])
                left -= count
        return digest.digest()

    def fingerprint(self) -> str:
        """sha256 over every tensor's name, dtype, shape and a few sampled blocks of its bytes.

        Cheap enough for each start of a server, and the same however the tensors are sharded. It
        tells models apart; it does not prove that no byte was changed: `digest` does.
        """
        total = hashlib.sha256()
        for name in sorted(self.tensors):
            info = self.tensors[name]
            total.update(self._label(name))
            with info.file.open("rb", buffering=0) as file:
                last = max(info.nbytes - _SAMPLE_BYTES, 0)
                for sample in range(_SAMPLES):
                    file.seek(info.start + last * sample // (_SAMPLES - 1))
                    total.update(file.read(min(_SAMPLE_BYTES, info.nbytes)))
        return total.hexdigest()

    def _label(self, name: str) -> bytes:
        info = self.tensors[name]
        return json.dumps([name, info.dtype, info.shape]).encode()


def _weight_files(folder: Path) -> Iterator[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [folder / Path(name).name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} is damaged ({error!r}); download it again") from error
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no {file.name}; expected model.safetensors, or shards with "
                "model.safetensors.index.json. Other formats must be converted to safetensors"
            )
        yield file


def read_header(file: Path, whole: bool = True) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, from its header. whole: whether the data has to be there too.

    Source: the safetensors format (8 bytes of little-endian length, a JSON header, the data).
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            if not 0 <= start <= end or (whole and end > size - 8 - length):
                raise ValueError(f"{name} lies outside of the file")
            shape = tuple(entry["shape"])
            info = TensorInfo(file, entry["dtype"], shape, 8 + length + start, end - start)
            dtype = FLOAT_DTYPES.get(info.dtype)
            if dtype is not None and math.prod(shape) * dtype.itemsize != info.nbytes:
                raise ValueError(f"{name} has {info.nbytes} bytes for shape {shape}")
            tensors[name] = info
        spans = sorted((info.start, info.start + info.nbytes) for info in tensors.values())
        if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
            raise ValueError("two tensors overlap")
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        with file.open("rb") as stream:
            found = other_format(stream.read(LONGEST_SIGN)) or str(error)
        raise CheckpointError(f"{file} is not a whole safetensors file: {found}") from error
