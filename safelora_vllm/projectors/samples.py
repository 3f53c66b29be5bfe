"""Samples of the aligned model's weights, kept in a projector cache: what a converted copy is compared with.

``aligned.samples``, in the format of safetensors, holds for each tensor of the aligned model,

- ``NAME`` (rows, 8): of each row of a weight (d_out, d_in) the values in 8 columns; a vector as it is;
- ``NAME.largest`` (rows,) float32: of each row of a weight the largest absolute value;
- ``NAME.change`` (rows, 8) bfloat16: V = W_aligned − W_base there, where both models have the weight.

The columns are random: a copy that is made to agree in them must know the file. So its seed is new for
each build, and the file is no part of the cache's identity: the same models give the same id.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from safelora_vllm.errors import CheckpointError, ProjectorCacheError
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.fp8 import FP8
from safelora_vllm.projectors.weight_files import FLOAT_DTYPES

SAMPLES = "aligned.samples"
PER_ROW = 8
_FORMAT, _VERSION = "safelora-samples", "2"
_CHANGE, _LARGEST = ".change", ".largest"
_WEIGHT = ".weight"
_PIECE = 32 * 1024 * 1024  # bytes of rows that are read at once


@dataclass(frozen=True)
class Samples:
    """The file of a cache.

    shapes: those of the aligned model's tensors, by name; of more than two sides (rows, columns). seed: of
    the columns. changes: names of weights that the base has too.
    """

    file: Path
    seed: bytes
    shapes: Mapping[str, tuple[int, ...]]
    changes: frozenset[str]

    def values(self, name: str) -> Tensor:
        """Of the aligned model, float64."""
        return self._read(name)

    def largest(self, name: str) -> Tensor:
        """The largest absolute values (rows,) of a weight of the aligned model, float64."""
        return self._read(f"{name}{_LARGEST}")

    def change(self, name: str) -> Tensor | None:
        """V in the same places, float64; None where the base has no such weight."""
        return self._read(f"{name}{_CHANGE}") if name in self.changes else None

    def _read(self, key: str) -> Tensor:
        with safe_open(self.file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        return tensor.to(torch.float64)


def columns(seed: bytes, name: str, rows: int, d_in: int) -> Tensor:
    """(rows, 8): which columns of each row are sampled."""
    stream = hashlib.shake_256(seed + name.encode()).digest(rows * PER_ROW * 8)
    found = np.frombuffer(stream, dtype="<u8") % d_in
    return torch.from_numpy(found.astype(np.int64)).reshape(rows, PER_ROW)


def write_samples(folder: Path, base: Checkpoint, aligned: Checkpoint) -> None:
    """Read both models once and write the file. Memory holds a piece of a weight and all samples.

    Raises:
        CheckpointError: a value is not finite.
    """
    seed, tensors, shapes = secrets.token_bytes(32), dict[str, Tensor](), dict[str, tuple[int, ...]]()
    scales = _scales(aligned)
    for name in tqdm(sorted(aligned.tensors), desc="Samples of the weights", unit="tensor"):
        info = aligned.tensors[name]
        if name in scales or not info.shape or not _readable(aligned, name):
            continue
        if len(info.shape) == 1:
            tensors[name], shapes[name] = aligned.read(name), info.shape
            continue
        rows, width = math.prod(info.shape[:-1]), info.shape[-1]
        if not rows or not width:
            continue
        shapes[name], where = (rows, width), columns(seed, name, rows, width)
        tensors[name], tensors[f"{name}{_LARGEST}"] = _sampled(aligned, name, where)
        other = base.tensors.get(name)
        if other is not None and other.shape == info.shape and _readable(base, name):
            of_base, _ = _sampled(base, name, where)
            change = tensors[name].to(torch.float64) - of_base.to(torch.float64)
            tensors[f"{name}{_CHANGE}"] = change.to(torch.bfloat16)
    if wrong := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise CheckpointError(
            f"{wrong[0]} of {aligned.folder} or {base.folder} has NaN or infinite values; download the model "
            "again"
        )
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "seed": seed.hex(),
        "aligned": aligned.fingerprint(),
        "shapes": json.dumps(shapes),
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SAMPLES, metadata)


def open_samples(folder: Path, aligned: str) -> Samples | None:
    """The samples of a cache. aligned: the fingerprint of its aligned model.

    Returns:
        None for a cache of an older release, which has none.

    Raises:
        ProjectorCacheError: the file is damaged or of another model.
    """
    file = folder / SAMPLES
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            metadata, keys = opened.metadata() or {}, frozenset(opened.keys())
        found = metadata.get("format"), metadata.get("version"), metadata.get("aligned")
        seed = bytes.fromhex(metadata["seed"])
        shapes = {str(name): tuple(map(int, shape)) for name, shape in json.loads(metadata["shapes"]).items()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProjectorCacheError(f"{file} is damaged ({error!r:.200}); build the cache again") from error
    if found != (_FORMAT, _VERSION, aligned):
        raise ProjectorCacheError(
            f"{file} is {found[0]!r:.80} version {found[1]!r:.80} of the model {str(found[2])[:12]}: "
            f"expected {_FORMAT} version {_VERSION} of {aligned[:12]}. Build the cache again"
        )
    changes = frozenset(key.removesuffix(_CHANGE) for key in keys if key.endswith(_CHANGE))
    return Samples(file, seed, shapes, changes)


def _scales(model: Checkpoint) -> set[str]:
    """Names of the scales of FP8 weights: they are part of the values that are sampled."""
    modules = [name.removesuffix(_WEIGHT) for name in model.tensors if _readable(model, name)]
    found = [model.scale_name(module) for module in modules if f"{module}{_WEIGHT}" in model.tensors]
    return {name for name, _ in filter(None, found)}


def _readable(model: Checkpoint, name: str) -> bool:
    """Whether a tensor's values are known: plain floats, and FP8 weights with their scales."""
    dtype, module = model.tensors[name].dtype, name.removesuffix(_WEIGHT)
    if dtype in FLOAT_DTYPES or dtype != FP8 or module == name:
        return dtype in FLOAT_DTYPES
    with contextlib.suppress(CheckpointError):
        return model.scale_name(module) is not None
    return False


def _sampled(model: Checkpoint, name: str, where: Tensor) -> tuple[Tensor, Tensor]:
    """The values of a weight in these columns of its rows, of FP8 what they stand for, in float32.

    Also the largest absolute value of each row, in float32.
    """
    module = name.removesuffix(_WEIGHT)
    if module != name and model.scale_name(module) is not None:
        whole = model.linear(module).reshape(len(where), -1)
        return whole.gather(1, where).to(torch.float32), _largest(whole)
    info = model.tensors[name]
    dtype, width = FLOAT_DTYPES[info.dtype], info.shape[-1]
    step = max(1, _PIECE // (width * dtype.itemsize))
    found, largest = [], []
    for start in range(0, len(where), step):
        part = where[start : start + step]
        row = width * dtype.itemsize
        data = model.raw(name, start * row, len(part) * row)
        rows = torch.frombuffer(data, dtype=dtype).reshape(len(part), width)
        found.append(rows.gather(1, part))
        largest.append(_largest(rows))
    return torch.cat(found), torch.cat(largest)


def _largest(rows: Tensor) -> Tensor:
    return torch.maximum(rows.amax(1), -rows.amin(1)).to(torch.float32)
