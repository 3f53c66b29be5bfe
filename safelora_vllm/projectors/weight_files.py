"""The safetensors files of a model's folder, and which tensors they hold, from their headers."""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from safelora_vllm.errors import CheckpointError
from safelora_vllm.projectors.fp8 import FP8
from safelora_vllm.safetensors_header import LONGEST_SIGN, other_format

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READ_DTYPES = FLOAT_DTYPES | {FP8: torch.float8_e4m3fn}
INDEX = "model.safetensors.index.json"  # of a model with shards
_MAX_HEADER = 100 * 1024 * 1024


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: file, dtype as safetensors names it, shape, first byte, length."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def weight_names(folder: Path) -> list[str]:
    """``model.safetensors``, or the shards that the index names, whether they are there or not.

    Raises:
        CheckpointError: the index is damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        return ["model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); download it again") from error


def weight_files(folder: Path) -> Iterator[Path]:
    """The files of `weight_names`.

    Raises:
        CheckpointError: a file is missing, or the index is damaged.
    """
    for file in (folder / name for name in weight_names(folder)):
        if not file.is_file():
            raise CheckpointError(
                f"{folder} has no {file.name}; expected model.safetensors, or shards with "
                "model.safetensors.index.json. Other formats must be converted to safetensors"
            )
        yield file


def refuse_other_files(folder: Path) -> None:
    """Refuse a folder with weights that vLLM would load instead of those of `weight_files`, or after them.

    Source: vLLM 0.32, ``DefaultModelLoader._prepare_weights``. It prefers ``consolidated*.safetensors``, and
    loads every ``*.safetensors`` where there is no index.

    Raises:
        CheckpointError: it has such files.
    """
    more = {file.name for file in folder.glob("consolidated*.safetensors")}
    if not (folder / INDEX).is_file():
        more |= {file.name for file in folder.glob("*.safetensors")} - {"model.safetensors"}
    if more:
        raise CheckpointError(
            f"{folder} has {min(more)} besides the weights that are compared: vLLM would load it. Serve a "
            f"folder without it: expected model.safetensors alone, or shards with {INDEX}. "
            "`trust_served_model` leaves all comparing out"
        )


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
            dtype = READ_DTYPES.get(info.dtype)
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
