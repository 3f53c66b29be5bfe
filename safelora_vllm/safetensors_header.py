"""The header of a safetensors file: what it holds and where, known before any of its data is read.

Format: the header's length in 8 bytes (little-endian), the header as JSON, the data. The safetensors
library reads it all again when it loads the tensors.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from safelora_vllm.errors import refuse

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # the dtypes that are served
_DTYPE = re.compile(r"[A-Z][A-Z0-9_]{0,15}")
_MAX_SIDES = 8
_MAX_TENSORS = 16_384  # a model of 128 layers with seven modules has 1,792 of them
_PICKLE = "it is a file of torch.save (a pickle, perhaps in a zip). Save it as safetensors"
_PAGE = "it is a web page, perhaps of a failed download. Download the file itself"
# How files begin that are sent in place of weights or a config; letters in lower case.
_OTHERS = {
    b"pk\3\4": _PICKLE,
    **{bytes((0x80, protocol, sign)): _PICKLE for protocol in range(2, 6) for sign in b"\x8a\x95}(]c"},
    b"version https://git-lfs": "it is a Git LFS pointer, not the file. Run 'git lfs pull'",
    b"<!doctype html": _PAGE,
    b"<html": _PAGE,
    b"\x1f\x8b": "it is a gzip archive. Unpack it, or send it as the archive",
    b"gguf": "it is a GGUF file. Save it as safetensors",
}
LONGEST_SIGN = 64  # bytes that tell, with blanks before them


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's line in the safetensors header."""

    dtype: str
    shape: tuple[int, ...]


Header = dict[str, TensorHeader]  # tensor name → its line


def read_header(file: BinaryIO, size: int, limit: int) -> tuple[bytes, Header]:
    """The beginning of a file of ``size`` bytes, and what it says. Its tensors must fill the file.

    Raises:
        AdapterRefused: weights_malformed, also where the header has more than ``limit`` bytes.
    """
    try:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("it ends before its header")
        (length,) = struct.unpack("<Q", start)
        if length > limit:
            raise ValueError(f"its header of {length:,} bytes is over the {limit:,} allowed")
        if length > size - 8:
            raise ValueError("it ends inside its header")
        text = file.read(length)
        entries = plain_json(text)
        entries.pop("__metadata__", None)
        if len(entries) > _MAX_TENSORS:
            raise ValueError(f"it names {len(entries):,} tensors, allowed are {_MAX_TENSORS:,}")
        _check_layout([_span(entry) for entry in entries.values()], size - 8 - length)
        header = {n: TensorHeader(entry["dtype"], tuple(entry["shape"])) for n, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        file.seek(0)
        found = other_format(file.read(LONGEST_SIGN)) or str(error)
        raise refuse("weights_malformed", f"the weights are not a whole safetensors file: {found}") from error
    return start + text, header


def other_format(beginning: bytes) -> str | None:
    """What a file is that is often taken for weights, and what to do; from its first `LONGEST_SIGN` bytes."""
    text = beginning.lstrip().lower()
    return next((found for sign, found in _OTHERS.items() if text.startswith(sign)), None)


def plain_json(text: bytes) -> Any:
    """What a text says that every JSON parser reads alike; ValueError or RecursionError otherwise."""
    return json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_reject_constant)


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _span(entry: dict[str, Any]) -> tuple[int, int]:
    """Where a tensor's data begins and ends; ValueError where its line contradicts itself."""
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise ValueError(f"a dtype is {dtype!r:.80}")
    if not _sizes(shape) or len(shape) > _MAX_SIDES:
        raise ValueError(f"a shape is {shape!r:.80}")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets are {offsets!r:.80}")
    begin, end = offsets
    if dtype in DTYPE_BYTES and math.prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        raise ValueError(f"{dtype} of the shape {shape} does not take {end - begin:,} bytes")
    return begin, end


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_layout(spans: list[tuple[int, int]], size: int) -> None:
    """The tensors lie one behind the other and fill the data, so that a short header claims no more."""
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError(f"a tensor begins at byte {begin:,} of the data, expected was {position:,}")
        position = end
    if position != size:
        raise ValueError(f"its tensors take {position:,} bytes, there are {size:,}; save or send it again")
