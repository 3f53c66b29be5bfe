"""The manifest of a projector cache: all of it is checked before any of it is used."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safelora_vllm.errors import ProjectorCacheError

FORMAT = "safelora-projectors"
FORMAT_VERSION = 3
EXACT_VERSION = 2  # without approximate directions, as older releases read it
_VERSIONS = (EXACT_VERSION, FORMAT_VERSION)
MANIFEST = "manifest.json"
MODELS = "models.json"  # beside it: what the build was given, which is no part of the cache's identity
THIN = "thin"  # the form of a module without Ĉ and V
OPERATORS = {"dense": "projector", "factored": "delta"}  # form → the part with Ĉ or V
ENERGY_ROUNDING = 1e-9  # of a share of ‖V‖_F², a sum of many float64 values
WHOLE = math.inf  # in the place of an energy: all directions that the cache has


@dataclass(frozen=True)
class ModuleEntry:
    """One module's line in the manifest.

    shape: (d_out, d_in) of the weight. form: ``dense``, ``factored`` or ``thin``. norm: ‖V‖_F. aligned_norm:
    ‖W_aligned‖_F. null_similarity: c₀ = tr(Ĉ)/(‖Ĉ‖_F √d_out). shard: file with its tensors. following:
    a bound on σ_i²/‖V‖_F² of all that is outside of approximate directions; 1 where they are exact.
    """

    name: str
    shape: tuple[int, int]
    form: str
    norm: float
    aligned_norm: float
    null_similarity: float
    shard: str
    following: float = 1.0


@dataclass(frozen=True)
class Shard:
    """A file of the cache. sha256: of all of it, hexadecimal. tensor_bytes: of the tensors in it."""

    sha256: str
    tensor_bytes: int


@dataclass(frozen=True)
class Manifest:
    """modules, shards: by name. aligned: fingerprint of that model. unchanged: modules
    without a projector, as V = 0 (or W_aligned = 0) there.
    """

    modules: dict[str, ModuleEntry]
    shards: dict[str, Shard]
    aligned: str
    unchanged: frozenset[str]


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """A sort key for names of modules and their tensors: layer 10 after layer 9."""
    return [_part_order(part) for part in name.split(".")]


def _part_order(part: str) -> tuple[bool, int, str]:
    number = part.isdecimal() and len(part) < 10  # int() takes no "²", and only so many digits
    return (True, int(part), part) if number else (False, 0, part)


def parse_manifest(text: bytes, folder: Path) -> Manifest:
    """What a manifest says.

    Raises:
        ProjectorCacheError: another format or version, or it is damaged.
    """
    try:
        data = json.loads(text)
        if data["format"] != FORMAT or data["version"] not in _VERSIONS:
            raise ProjectorCacheError(
                f"{folder} is {data['format']!r:.100} version {data['version']!r:.100}; this release reads "
                f"{FORMAT} version {' or '.join(map(str, _VERSIONS))}. Build it again"
            )
        shards = {_file(name): _shard(**shard) for name, shard in data["shards"].items()}
        entries = [_entry(shards, **entry) for entry in data["modules"]]
        modules = {entry.name: entry for entry in entries}
        if len(modules) != len(entries):
            raise ValueError("a module stands there twice")
        unchanged = frozenset(map(_text, data["unchanged_modules"]))
        return Manifest(modules, shards, _text(data["aligned"]["fingerprint"]), unchanged)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        found = f"{folder / MANIFEST} is damaged ({error!r:.200})"
        raise ProjectorCacheError(f"{found}; build the cache again") from error


def _shard(sha256: Any, tensor_bytes: Any) -> Shard:
    if type(tensor_bytes) is not int or tensor_bytes < 0:
        raise ValueError(f"tensor_bytes is {tensor_bytes!r}")
    return Shard(_text(sha256), tensor_bytes)


def _entry(
    shards: dict[str, Shard], name: Any, shape: Any, form: Any, shard: Any, **figures: Any
) -> ModuleEntry:
    if form not in ("dense", "factored", THIN) or shard not in shards:
        raise ValueError(f"{name} has the form {form!r} and the shard {shard!r}")
    rows, columns = shape
    if not all(type(side) is int and 0 < side < 2**31 for side in (rows, columns)):
        raise ValueError(f"{name} has the shape {shape}")
    for figure, value in figures.items():
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"{figure} of {name} is {value!r}")
    return ModuleEntry(name=_text(name), shape=(rows, columns), form=form, shard=shard, **figures)


def _file(name: str) -> str:
    if name != Path(name).name:
        raise ValueError(f"{name!r} is no file beside the manifest")
    return name


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
