"""Reading a model's safetensors checkpoint one tensor at a time, without ever holding the model.

Tensors are read with plain file reads, not memory maps: a map's pages count as the process's
memory until the kernel takes them back, a buffer is gone when its tensor is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safelora_vllm.errors import CheckpointError
from safelora_vllm.files import FileState, states
from safelora_vllm.projectors import fp8
from safelora_vllm.projectors.weight_files import (
    FLOAT_DTYPES,
    READ_DTYPES,
    TensorInfo,
    read_header,
    weight_files,
)

_SAMPLES, _SAMPLE_BYTES = 8, 256
_PIECE = 8 * 1024 * 1024


def at_revision(model: str | Path, revision: str | None) -> str:
    """What `locate_model` finds a model by; a folder has no revisions."""
    return f"{model}@{revision}" if revision and not Path(model).is_dir() else str(model)


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
        """The absolute path of a folder, an address, or a hub id without its ``@revision``."""
        if "://" in str(model):
            return cls(str(model).partition("?")[0])
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
        for file in weight_files(self.folder):
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

    def raw(self, name: str, start: int = 0, nbytes: int | None = None) -> bytearray:
        """A tensor's bytes, or ``nbytes`` of them from ``start`` on."""
        info = self.tensors[name]
        buffer = bytearray(info.nbytes - start if nbytes is None else nbytes)
        with info.file.open("rb", buffering=0) as file:
            file.seek(info.start + start)
            view, done = memoryview(buffer), 0
            while done < len(buffer):
                count = file.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{info.file} ends inside {name}; download it again")
                done += count
        return buffer

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype.

        Raises:
            CheckpointError: no such tensor, or a dtype that is neither a plain float nor FP8.
        """
        dtype = READ_DTYPES[self._info(name).dtype]
        flat = torch.frombuffer(self.raw(name), dtype=dtype)
        return flat.reshape(self.tensors[name].shape)

    def linear(self, module: str) -> Tensor:
        """A linear layer's W (d_out, d_in) as it is stored; FP8 with its scales applied, in float64.

        Raises:
            CheckpointError: as `check_weight`, or a scale is not finite.
        """
        weight, scaled = self.read(f"{module}.weight"), self.scale(module)
        return weight if scaled is None else fp8.dequantised(weight, *scaled)

    def weight(self, module: str, device: str | torch.device = "cpu") -> Tensor:
        """A linear layer's W (d_out, d_in) in float64; see `linear`."""
        return self.linear(module).to(device).to(torch.float64)

    def rounding(self, module: str, device: str | torch.device = "cpu") -> float:
        """The ‖·‖² that rounding to FP8 is expected to have added to a linear layer's W; 0 for other weights.

        Raises:
            CheckpointError: as `weight`.
        """
        scaled = self.scale(module)
        return 0.0 if scaled is None else fp8.rounding(self.read(f"{module}.weight").to(device), *scaled)

    def check_weight(self, module: str) -> None:
        """Whether `weight` can read a linear layer, from headers alone.

        Raises:
            CheckpointError: no such layer, a quantisation that is not read, or FP8 without its scale.
        """
        self.scale_name(module)

    def is_fp8(self, module: str) -> bool:
        """Whether the weight of a linear layer is FP8."""
        return self.tensors[f"{module}.weight"].dtype == fp8.FP8

    def scale(self, module: str) -> tuple[Tensor, fp8.Block] | None:
        """An FP8 weight's scale and the blocks it is for; None for other weights."""
        if (found := self.scale_name(module)) is None:
            return None
        name, block = found
        values = self.read(name)
        if not bool(values.to(torch.float64).isfinite().all()):
            raise CheckpointError(
                f"{name} in {self.folder} has NaN or infinite values; download the model again"
            )
        return values, block

    def scale_name(self, module: str) -> tuple[str, fp8.Block] | None:
        """The name of an FP8 weight's scale and the blocks it is for; None for other weights."""
        name = f"{module}.weight"
        weight = self._info(name)
        if weight.dtype != fp8.FP8:
            return None
        layout = self._scale_layout
        if unread := [suffix for suffix in fp8.UNREAD if f"{module}.{suffix}" in self.tensors]:
            raise CheckpointError(f"{name} in {self.folder} has a {unread[0]}, which is not read. {fp8.CURE}")
        candidates = [f"{module}.{suffix}" for suffix in layout.suffixes]
        scales = [scale for scale in candidates if scale in self.tensors]
        if len(scales) != 1:
            found = "no scale" if not scales else f"two scales, {' and '.join(scales)}"
            raise CheckpointError(
                f"{name} in {self.folder} is {fp8.FP8} with {found}: expected {' or '.join(candidates)}. "
                "Download the model again, or give the unquantised checkpoint"
            )
        scale = self._info(scales[0])
        block = layout.block_of(weight.shape, scale.shape) if scale.dtype in FLOAT_DTYPES else None
        if block is None:
            raise CheckpointError(
                f"{scales[0]} in {self.folder} is {scale.dtype} {scale.shape}: by its quantization_config "
                f"({layout.method}) a weight {weight.shape} has floats {layout.expected(weight.shape)}. "
                "Download the model again, or give the unquantised checkpoint"
            )
        return scales[0], block

    @cached_property
    def _scale_layout(self) -> fp8.ScaleLayout:
        return fp8.scale_layout(self.config, self.folder)

    def _info(self, name: str) -> TensorInfo:
        """The header's line of a tensor that can be read."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}")
        info = self.tensors[name]
        if info.dtype not in READ_DTYPES:
            method = fp8.quantisation_of(self.config).get("quant_method")
            by = f" The model is quantised by {method!r:.80}." if method else ""
            raise CheckpointError(
                f"{name} in {self.folder} is {info.dtype}; expected one of {list(READ_DTYPES)}.{by} "
                f"{fp8.CURE}"
            )
        return info

    def digest(self, progress: Iterable[str] | None = None) -> str:
        """sha256 over every tensor's name, dtype, shape and bytes: the checkpoint's full identity.

        Scales of FP8 weights are tensors like all others. What the config says of their blocks comes first.
        ``progress`` may wrap ``sorted(self.tensors)`` in a progress bar.
        """
        total = hashlib.sha256(self._scaling())
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

    def file_states(self) -> list[FileState]:
        """Of the files with its tensors: they tell an edit that the samples of `fingerprint` do not."""
        return list(states(sorted({info.file for info in self.tensors.values()})))

    def fingerprint(self) -> str:
        """sha256 over every tensor's name, dtype, shape and a few sampled blocks of its bytes.

        Cheap enough for each start of a server, and the same however the tensors are sharded. It
        tells models apart; it does not prove that no byte was changed: `digest` does.
        """
        total = hashlib.sha256(self._scaling())
        for name in sorted(self.tensors):
            info = self.tensors[name]
            total.update(self._label(name))
            with info.file.open("rb", buffering=0) as file:
                last = max(info.nbytes - _SAMPLE_BYTES, 0)
                for sample in range(_SAMPLES):
                    file.seek(info.start + last * sample // (_SAMPLES - 1))
                    total.update(file.read(min(_SAMPLE_BYTES, info.nbytes)))
        return total.hexdigest()

    def _scaling(self) -> bytes:
        """What of the config gives FP8 weights their values; nothing for a form that cannot be built from."""
        if all(info.dtype != fp8.FP8 for info in self.tensors.values()):
            return b""
        with contextlib.suppress(CheckpointError):
            return json.dumps(self._scale_layout.blocks).encode()
        return b""

    def _label(self, name: str) -> bytes:
        info = self.tensors[name]
        return json.dumps([name, info.dtype, info.shape]).encode()
