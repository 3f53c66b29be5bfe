"""Bounded reading of a PEFT adapter, a folder or one archive: regular files only, each read once.

What is judged and what is published come from the same bytes, so a file that is swapped afterwards
changes nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelora_vllm.adapters.archive import read_archive
from safelora_vllm.errors import AdapterNotFound, AdapterRefused, Reason, refuse

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_UNSAFE_WEIGHTS = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_BESIDE_BYTES = 64 * 1024**2  # what an archive may hold besides both files: tokenizer, README


@dataclass(frozen=True)
class Limits:
    """Upper bounds of what is read and accepted. Sizes in bytes."""

    config_bytes: int = 1024 * 1024
    weights_bytes: int = 2 * 1024**3
    header_bytes: int = 8 * 1024 * 1024
    max_rank: int = 512


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's line in the safetensors header."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class RawAdapter:
    """An adapter's bytes. ``digest`` names this content: equal bytes, equal digest."""

    config: dict[str, Any]
    header: dict[str, TensorHeader]
    config_bytes: bytes = field(repr=False)
    weights: bytes = field(repr=False)
    digest: str

    @property
    def files(self) -> dict[str, bytes]:
        """Both files as they were read, under PEFT's names."""
        return {CONFIG: self.config_bytes, WEIGHTS: self.weights}


def read_adapter(path: str | Path, limits: Limits) -> RawAdapter:
    """Read ``adapter_config.json`` and ``adapter_model.safetensors`` of a PEFT folder.

    The folder may also come as one .tar, .tar.gz or .zip, known by its first bytes.

    Raises:
        AdapterNotFound: there is nothing at the path, or one of the two files alone.
        AdapterRefused: a file or the archive is missing, too large, not regular, not readable, or
            malformed; or the archive is ambiguous or unsafe.
    """
    path = Path(path)
    try:
        folder = path.is_dir()
        there = folder or (path.exists() and path.name not in (CONFIG, WEIGHTS))
    except (OSError, ValueError):  # a name too long for the file system, or with a zero byte
        folder = there = False
    if not there:
        raise _not_found(path)
    files = _read_folder(path, limits) if folder else _read_archive(path, limits)
    config_bytes, weights = files[CONFIG], files[WEIGHTS]
    sides = hashlib.sha256(config_bytes).digest() + hashlib.sha256(weights).digest()
    return RawAdapter(
        config=_parse_config(config_bytes),
        header=_parse_header(weights, limits.header_bytes),
        config_bytes=config_bytes,
        weights=weights,
        digest=hashlib.sha256(sides).hexdigest(),
    )


def _not_found(path: Path) -> AdapterNotFound:
    return AdapterNotFound(
        f"there is no adapter folder {str(path)!r:.300}; give a folder that PEFT saved, "
        "or a .tar or .zip of one"
    )


def _read_folder(folder: Path, limits: Limits) -> dict[str, bytes]:
    files = {}
    for name, limit in _wanted(limits).items():
        try:
            files[name] = _read_file(folder / name, name, limit)
        except FileNotFoundError:
            reason = _missing(name, lambda other: (folder / other).exists())
            raise AdapterRefused([reason]) from None
    return files


def _read_archive(path: Path, limits: Limits) -> dict[str, bytes]:
    allowed = limits.config_bytes + limits.weights_bytes + _BESIDE_BYTES
    try:
        data = _read_file(path, "the archive", allowed)
    except FileNotFoundError:
        raise _not_found(path) from None
    files, others = read_archive(data, _wanted(limits), allowed)
    if missing := [_missing(name, others.__contains__) for name in _wanted(limits) if name not in files]:
        raise AdapterRefused(missing)
    return files


def _wanted(limits: Limits) -> dict[str, int]:
    return {CONFIG: limits.config_bytes, WEIGHTS: limits.weights_bytes}


def _missing(name: str, exists: Callable[[str], bool]) -> Reason:
    if name == WEIGHTS and (found := [other for other in _UNSAFE_WEIGHTS if exists(other)]):
        return Reason("unsafe_format", f"{found[0]} is a pickle; save the adapter as {WEIGHTS}")
    return Reason("missing_file", f"the adapter has no {name}")


def _read_file(path: Path, name: str, limit: int) -> bytes:
    """The bytes of one regular file. Never follows a link and never waits on a pipe or device.

    Raises:
        FileNotFoundError: there is none.
        AdapterRefused: it is not regular, cannot be read, or is larger than the limit.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise refuse("not_regular_file", f"{name} is a link or a socket; copy the file") from error
        raise refuse("unreadable_file", f"{name} cannot be opened: {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise refuse("not_regular_file", f"{name} is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        try:
            data = file.read(status.st_size + 1) if status.st_size <= limit else None
        except OSError as error:
            raise refuse("unreadable_file", f"{name} cannot be read: {error.strerror}") from error
    if data is None or len(data) > limit:
        raise refuse("too_large", f"{name} is larger than the {limit:,} bytes that are allowed")
    return data


def _parse_config(text: bytes) -> dict[str, Any]:
    try:
        config = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise refuse("config_malformed", f"{CONFIG} is not plain JSON: {error}") from error
    if not isinstance(config, dict):
        raise refuse("config_malformed", f"{CONFIG} is not a JSON object")
    return config


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _parse_header(weights: bytes, limit: int) -> dict[str, TensorHeader]:
    """Names, dtypes and shapes from the header (safetensors format: length, JSON, data).

    The data itself is checked by the safetensors library when it is loaded.
    """
    try:
        if len(weights) < 8:
            raise ValueError("it ends before its header")
        (length,) = struct.unpack("<Q", weights[:8])
        if length > limit:
            raise ValueError(f"its header of {length:,} bytes is over the {limit:,} allowed")
        if length > len(weights) - 8:
            raise ValueError("it ends inside its header")
        header = json.loads(
            weights[8 : 8 + length], object_pairs_hook=_no_repeats, parse_constant=_reject_constant
        )
        header.pop("__metadata__", None)
        return {
            name: TensorHeader(str(entry["dtype"]), _shape(entry["shape"])) for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterRefused(
            [Reason("weights_malformed", f"{WEIGHTS} is not a whole safetensors file: {error}")]
        ) from error


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(side) is int and side >= 0 for side in value):
        raise ValueError(f"a shape is {value!r}")
    return tuple(value)
