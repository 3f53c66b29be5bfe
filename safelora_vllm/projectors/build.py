"""Building a projector cache from a base and an aligned checkpoint, one module at a time."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from safelora_vllm.errors import CheckpointError, UsageError
from safelora_vllm.projectors.checkpoint import Checkpoint, ModelName
from safelora_vllm.projectors.dominant import dominant
from safelora_vllm.projectors.exact_products import exact_products
from safelora_vllm.projectors.manifest import (
    EXACT_VERSION,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MODELS,
    THIN,
    ModuleEntry,
)
from safelora_vllm.projectors.partial_cache import PartialCache, partial_cache
from safelora_vllm.projectors.read_ahead import Weights, reading_ahead
from safelora_vllm.projectors.selection import select_modules
from safelora_vllm.projectors.weight_change import weight_change
from safelora_vllm.projectors.work import operations

__all__ = ["BuildOptions", "build", "build_module", "select_modules"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_ENERGY = 0.95
THIN_MAX_ENERGY = 0.4  # twice the energy of the default policy; what is above it takes most of the room
_BY_THIN = float("nan")  # stands for one of both; any other NaN is out of range
_OF_OPERATORS = ("dtype", "form")  # options that are about Ĉ and V
_SHARD_BYTES = 256 * 1024 * 1024  # of a thin cache a quarter, which is as many minutes of work
_DOMINANT_FROM = 512  # sides of V; below, all singular vectors take as long as a few
_BAR = "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]"


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

    The folder appears when it is whole. A build that is killed, or fails after some shards, leaves a hidden
    folder. The next build of the same models with the same options goes on from there; one with other options
    removes it. Memory holds two modules and one shard, whatever the number of layers.

    Raises:
        CheckpointError: the models are not a pair, are identical, or hold non-finite weights.
        UsageError: ``out`` exists, another build of it is running, or the disk is full.
    """
    options = options or BuildOptions()
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out} exists: remove it, or give another folder as `out`")
    pair = Checkpoint(base), Checkpoint(aligned)
    names = select_modules(*pair, options.modules)
    _check_different(*pair)
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial_cache(out, _key(pair, names, options)) as partial:
        left = names[len(partial.modules) + len(partial.unchanged) :]
        _check_disk(out.parent, pair[1], left, options)
        _add_modules(partial, pair, names, left, options)
        if not partial.modules:
            raise _identical(*pair)
        given = {"base": ModelName.of(base), "aligned": ModelName.of(aligned)}
        models = json.dumps({side: asdict(name) for side, name in given.items()}, indent=1)
        partial.finish(out, {MANIFEST: _manifest(partial, pair, options), MODELS: models})
    return out


def _key(pair: tuple[Checkpoint, Checkpoint], names: list[str], options: BuildOptions) -> str:
    """A digest of all that the bytes of a cache depend on."""
    models = [model.fingerprint() for model in pair]
    releases = [FORMAT_VERSION, version("safelora-vllm"), torch.__version__, _SHARD_BYTES]
    return hashlib.sha256(json.dumps([models, names, asdict(options), releases]).encode()).hexdigest()


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


def _add_modules(
    partial: PartialCache, pair: tuple[Checkpoint, Checkpoint], names: list[str], left: list[str],
    options: BuildOptions,
) -> None:  # fmt: skip
    """Compute the modules that are left and write their shards."""
    largest = _SHARD_BYTES // (4 if options.thin else 1)
    work = {name: operations(pair[1].tensors[f"{name}.weight"].shape) for name in names}
    tensors: dict[str, Tensor] = {}
    modules: list[dict[str, Any]] = []
    unchanged: list[str] = []

    def flush() -> None:
        partial.add(tensors, list(modules), list(unchanged))
        for collected in (tensors, modules, unchanged):
            collected.clear()

    with (
        reading_ahead(pair, [f"{name}.weight" for name in left]) as (base, aligned),
        tqdm(total=sum(work.values()), initial=sum(work.values()) - sum(work[name] for name in left),
             desc="Projectors", bar_format=_BAR) as bar,
    ):  # fmt: skip
        for number, name in enumerate(left, len(names) - len(left) + 1):
            bar.set_postfix_str(f"module {number} of {len(names)}")
            if (built := build_module(name, base, aligned, options)) is None:
                unchanged.append(name)
            else:
                figures, new = built
                if tensors and sum(t.nbytes for t in (*tensors.values(), *new.values())) > largest:
                    flush()
                tensors |= {f"{name}.{part}": tensor for part, tensor in new.items()}
                modules.append(asdict(ModuleEntry(name=name, shard=partial.next_shard, **figures)))
            bar.update(work[name])
    if tensors:
        flush()
    partial.unchanged += unchanged


def _manifest(partial: PartialCache, pair: tuple[Checkpoint, Checkpoint], options: BuildOptions) -> str:
    """Of a cache whose shards are all written. Both models are read once more, for their digests."""
    sides = ("base", "aligned")
    with (
        ThreadPoolExecutor(len(sides)) as threads,
        tqdm(
            total=sum(len(model.tensors) for model in pair), desc="Digests of both models", unit="tensor"
        ) as bar,
    ):

        def counted(model: Checkpoint) -> Iterator[str]:
            for name in sorted(model.tensors):
                yield name
                bar.update()

        digests = list(threads.map(lambda model: model.digest(counted(model)), pair))
    approximate = any(entry["following"] < 1.0 for entry in partial.modules)
    modules = partial.modules
    if not approximate:
        modules = [{part: value for part, value in entry.items() if part != "following"} for entry in modules]
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION if approximate else EXACT_VERSION,
        **{
            side: {"fingerprint": model.fingerprint(), "sha256": digest}
            for side, model, digest in zip(sides, pair, digests, strict=True)
        },
        "dtype": None if options.thin else options.dtype,
        "max_energy": options.max_energy,
        "unchanged_modules": partial.unchanged,
        "shards": partial.shards,
        "modules": modules,
    }
    return json.dumps(manifest, indent=1, allow_nan=False)


def build_module(
    name: str, base: Weights, aligned: Weights, options: BuildOptions
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Figures and tensors of one module, or None where alignment did not change it (V = 0).

    None too where W_aligned = 0: no adapter has a size relative to it.

    A thin cache needs only V's dominant directions: see `dominant`. Else, and where too many are dominant,
    the Gram matrix of V's smaller side gives everything: Ĉ where that side is the output, c₀, and the
    singular values and vectors. All in float64 before the cast.
    """
    weights = [model.read(f"{name}.weight").to(options.device) for model in (base, aligned)]
    if options.thin and min(weights[0].shape) >= _DOMINANT_FROM:
        return _thin_module(name, weights, options)
    before, after = (weight.to(torch.float64) for weight in weights)
    weights.clear()
    aligned_norm = float(after.norm())
    delta = after - before
    del before, after
    return _whole_module(name, delta, float(delta.norm()), aligned_norm, options)


def _thin_module(
    name: str, weights: list[Tensor], options: BuildOptions
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """As `build_module`, of W_base and W_aligned, which are released as soon as V is there."""
    change = weight_change(*weights)
    weights.clear()
    if not _changed(name, change.norm, change.aligned_norm):
        return None
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
    with exact_products():
        found = dominant(change.v, change.norm / change.scale, options.max_energy, seed)
    if found is None:
        delta = change.v.to(torch.float64) * change.scale
        return _whole_module(name, delta, change.norm, change.aligned_norm, options)
    tensors = {
        "input_basis": found.right.to(torch.float32),
        "output_basis": found.left.to(torch.float32),
        "energy": torch.stack([found.shares, found.residuals]),
    }
    figures = {
        "shape": tuple(change.v.shape),
        "form": THIN,
        "norm": change.norm,
        "aligned_norm": change.aligned_norm,
        "null_similarity": 1.0 / (found.gram_norm * math.sqrt(change.v.shape[0])),
        "following": found.following,
    }
    return figures, _on_cpu(tensors)


def _whole_module(
    name: str, delta: Tensor, norm: float, aligned_norm: float, options: BuildOptions
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """As `build_module`, of V in float64, with all of its singular vectors up to the energy."""
    if not _changed(name, norm, aligned_norm):
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
    return figures, _on_cpu(tensors)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {part: tensor.cpu().contiguous() for part, tensor in tensors.items()}


def _changed(name: str, norm: float, aligned_norm: float) -> bool:
    """Whether a module has a projector.

    Raises:
        CheckpointError: a weight is not finite.
    """
    if not (math.isfinite(norm) and math.isfinite(aligned_norm)):
        raise CheckpointError(f"{name}.weight has NaN or infinite values; download the model again")
    return norm > 0.0 and aligned_norm > 0.0


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
