"""Building a projector cache from a base and an aligned checkpoint, one module at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from safelora_vllm.errors import CheckpointError, UsageError
from safelora_vllm.projectors.checkpoint import Checkpoint, ModelName
from safelora_vllm.projectors.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MODELS,
    THIN,
    ModuleEntry,
)
from safelora_vllm.projectors.rounding import check_quantisation
from safelora_vllm.projectors.selection import select_modules

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_ENERGY = 0.95
THIN_MAX_ENERGY = 0.4  # twice the energy of the default policy; what is above it takes most of the room
_BY_THIN = float("nan")  # stands for one of both; any other NaN is out of range
_OF_OPERATORS = ("dtype", "form")  # options that are about Ĉ and V
_SHARD_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    modules: names or last parts of names (``q_proj``); empty means all linear layers.
    dtype: of Ĉ or V in the cache. form: ``auto`` takes dense where d_out ≤ d_in.
    max_energy: share of ‖V‖_F² up to which its singular vectors are kept; no policy can have more. Default:
    0.95; with ``thin`` 0.4.
    thin: keep neither Ĉ nor V, but only the bases and the figures.
    """

    modules: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    form: str = "auto"
    device: str = "cpu"
    max_energy: float = _BY_THIN
    thin: bool = False

    def __post_init__(self) -> None:
        if self.max_energy is _BY_THIN:
            object.__setattr__(self, "max_energy", THIN_MAX_ENERGY if self.thin else MAX_ENERGY)
        if self.dtype not in DTYPES:
            raise UsageError(f"`dtype` is {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if self.form not in ("auto", "dense", "factored"):
            raise UsageError(f"`form` is {self.form!r}: expected auto, dense or factored")
        if not 0.0 < self.max_energy <= 1.0:
            raise UsageError(f"`max_energy` is {self.max_energy}: expected a share above 0 and at most 1")
        self.check_effective(n for n in _OF_OPERATORS if getattr(self, n) != getattr(BuildOptions, n))

    def check_effective(self, given: Iterable[str]) -> None:
        """Refuse options that somebody gave and that change nothing in a thin cache.

        Raises:
            UsageError: such as ``form`` with ``thin``.
        """
        for name in given:
            if self.thin and name in _OF_OPERATORS:
                raise UsageError(
                    f"`{name}` has no effect with `thin`: it is about Ĉ and V, and a thin cache has neither. "
                    f"Leave `{name}` or `thin` out"
                )


def build(
    base: str | Path, aligned: str | Path, out: str | Path, options: BuildOptions | None = None
) -> Path:
    """Write the projector cache of a model pair to the folder ``out`` and return it.

    The folder appears when it is whole; a build that is killed leaves only a hidden folder that the
    next build removes. Memory holds one module and one shard, whatever the number of layers.

    Raises:
        CheckpointError: the models are not a pair, are identical, or hold non-finite weights.
        UsageError: ``out`` exists, or the disk is full.
    """
    options = options or BuildOptions()
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out} exists: remove it, or give another folder as `out`")
    pair = Checkpoint(base), Checkpoint(aligned)
    names = select_modules(*pair, options.modules)
    check_quantisation(*pair, names, options.device)
    _check_different(*pair)
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    _check_disk(out.parent, pair[1], names, options)
    partial = Path(tempfile.mkdtemp(prefix=f"{_partial_prefix(out)}{os.getpid()}-", dir=out.parent))
    partial.chmod(0o755)
    try:
        _write(partial, pair, names, options)
        given = {"base": ModelName.of(base), "aligned": ModelName.of(aligned)}
        (partial / MODELS).write_text(
            json.dumps({side: asdict(name) for side, name in given.items()}, indent=1)
        )
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # safetensors reports a full disk in words only.
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise UsageError(f"no room left on the disk of {out}; free some and repeat") from error
        raise
    return out


def _check_different(base: Checkpoint, aligned: Checkpoint) -> None:
    """Find out before hours of work that both are one model. Where samples are equal, all is read once.

    Raises:
        CheckpointError: they are.
    """
    if base.folder.resolve() != aligned.folder.resolve():
        if base.fingerprint() != aligned.fingerprint():
            return
        one, other = (
            model.digest(_with_progress(model, "Comparing the models")) for model in (base, aligned)
        )
        if one != other:
            return
    raise _identical(base, aligned)


def _identical(base: Checkpoint, aligned: Checkpoint) -> CheckpointError:
    return CheckpointError(
        f"{base.folder} and {aligned.folder} have identical weights (V = 0): there is no alignment to "
        "project onto. Give the model before alignment as the base"
    )


def _with_progress(model: Checkpoint, what: str) -> Iterable[str]:
    return tqdm(sorted(model.tensors), desc=what, unit="tensor")


def _write(
    folder: Path, pair: tuple[Checkpoint, Checkpoint], names: list[str], options: BuildOptions
) -> None:
    base, aligned = pair
    entries: list[dict[str, Any]] = []
    shards: dict[str, dict[str, Any]] = {}
    unchanged: list[str] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        file = folder / f"projectors-{len(shards):05d}.safetensors"
        save_file(pending, file)
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        held = sum(tensor.nbytes for tensor in pending.values())
        shards[file.name] = {"sha256": digest, "tensor_bytes": held}
        pending.clear()

    for name in tqdm(names, desc="Projectors", unit="module"):
        built = build_module(name, *pair, options)
        if built is None:
            unchanged.append(name)
            continue
        figures, tensors = built
        if pending and sum(t.nbytes for t in (*pending.values(), *tensors.values())) > _SHARD_BYTES:
            flush()
        pending.update({f"{name}.{part}": tensor for part, tensor in tensors.items()})
        shard = f"projectors-{len(shards):05d}.safetensors"
        entries.append(asdict(ModuleEntry(name=name, shard=shard, **figures)))
    if not entries:
        raise _identical(base, aligned)
    flush()
    identities = {}
    for side, model in (("base", base), ("aligned", aligned)):
        weights = _with_progress(model, f"Digest of the {side} model")
        identities[side] = {"fingerprint": model.fingerprint(), "sha256": model.digest(weights)}
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **identities,
        "dtype": None if options.thin else options.dtype,
        "max_energy": options.max_energy,
        "unchanged_modules": unchanged,
        "shards": shards,
        "modules": entries,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False))


def build_module(
    name: str, base: Checkpoint, aligned: Checkpoint, options: BuildOptions
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Figures and tensors of one module, or None where alignment did not change it (V = 0).

    None too where W_aligned = 0: no adapter has a size relative to it.

    The Gram matrix of V's smaller side gives everything: Ĉ where that side is the output, c₀, and
    the singular values and vectors. All in float64 before the cast.
    """
    before, after = (model.weight(name, options.device) for model in (base, aligned))
    delta = after - before
    norm, aligned_norm = float(delta.norm()), float(after.norm())
    if not (math.isfinite(norm) and math.isfinite(aligned_norm)):
        raise CheckpointError(f"{name}.weight has NaN or infinite values; download the model again")
    if norm == 0.0 or aligned_norm == 0.0:
        return None
    d_out, d_in = delta.shape
    wide = d_out <= d_in
    small = delta @ delta.T if wide else delta.T @ delta
    null_similarity = norm**2 / (float(small.norm()) * math.sqrt(d_out))
    form = THIN if options.thin else options.form
    if form == "auto":
        form = "dense" if wide else "factored"
    dtype = DTYPES[options.dtype]
    tensors = {}
    if form == "dense":
        tensors["projector"] = ((small if wide else delta @ delta.T) / norm).to(dtype)
    elif form == "factored":
        tensors["delta"] = delta.to(dtype)
    tensors |= _bases(delta, small, wide, options.max_energy)
    figures = {"shape": (d_out, d_in), "form": form, "norm": norm, "aligned_norm": aligned_norm}
    figures["null_similarity"] = null_similarity
    return figures, {part: tensor.cpu().contiguous() for part, tensor in tensors.items()}


def _bases(delta: Tensor, small: Tensor, wide: bool, max_energy: float) -> dict[str, Tensor]:
    """L (d_out, k), R (d_in, k) and the energy shares (k,), from V's smaller Gram matrix.

    Its eigenvectors are V's singular vectors of one side. V takes each to its partner on the other side, and
    QR, which goes from the first column to the last, makes those orthonormal and keeps their order.
    """
    values, vectors = torch.linalg.eigh(small)
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    shares = values.cumsum(0) / values.sum()
    k = min(int((shares < max_energy - 1e-9).sum()) + 1, len(shares))
    near = vectors[:, :k]
    far = torch.linalg.qr((delta.T if wide else delta) @ near).Q
    left, right = (near, far) if wide else (far, near)
    bases = {"input_basis": right.to(torch.float32), "output_basis": left.to(torch.float32)}
    return {**bases, "energy": shares[:k]}


def _check_disk(parent: Path, aligned: Checkpoint, names: list[str], options: BuildOptions) -> None:
    """Refuse a disk that is too small.

    How many singular vectors hold the energy is not known yet: at most its share of them, for the largest
    come first.
    """
    element = 0 if options.thin else DTYPES[options.dtype].itemsize
    shapes = [aligned.tensors[f"{name}.weight"].shape for name in names]
    sides = [(rows, rows if options.form == "dense" else min(rows, cols)) for rows, cols in shapes]
    if options.form == "factored":
        sides = [(rows, cols) for rows, cols in shapes]
    needed = sum(rows * cols * element for rows, cols in sides)
    for rows, cols in shapes:
        kept = math.ceil(options.max_energy * min(rows, cols))
        needed += kept * ((rows + cols) * torch.float32.itemsize + torch.float64.itemsize)
    if (free := shutil.disk_usage(parent).free) < needed:
        raise UsageError(
            f"the cache needs up to {needed:,} bytes, {parent} has {free:,} free; free some, or give "
            "fewer `modules` or a smaller `max_energy`"
        )


def _partial_prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _remove_leftovers(out: Path) -> None:
    """Delete what killed builds of ``out`` left, but not what a running one is writing."""
    prefix = _partial_prefix(out)
    for leftover in out.parent.iterdir():
        if not leftover.name.startswith(prefix):
            continue
        pid = leftover.name.removeprefix(prefix).partition("-")[0]
        if not (pid.isdigit() and pid != str(os.getpid()) and Path(f"/proc/{pid}").exists()):
            shutil.rmtree(leftover, ignore_errors=True)
