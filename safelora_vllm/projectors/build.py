"""Building a projector cache from a base and an aligned checkpoint, one module at a time."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import threading
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
from safelora_vllm.files import check_new
from safelora_vllm.projectors.checkpoint import Checkpoint, ModelName
from safelora_vllm.projectors.manifest import (
    EXACT_VERSION,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MODELS,
    THIN,
    ModuleEntry,
)
from safelora_vllm.projectors.module import Built, thin_module, whole_module
from safelora_vllm.projectors.next_weights import Weights, weights_ahead
from safelora_vllm.projectors.partial_cache import PartialCache, partial_cache
from safelora_vllm.projectors.rounding import check_quantisation
from safelora_vllm.projectors.samples import write_samples
from safelora_vllm.projectors.selection import select_modules
from safelora_vllm.projectors.work import operations

__all__ = ["BuildOptions", "build", "build_module", "select_modules"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_ENERGY = 0.4  # twice the energy of the default policy; what is above it takes most of the room
EXACT_MAX_ENERGY = 0.95
_BY_EXACT = float("nan")  # stands for one of both; any other NaN is out of range
_OF_OPERATORS = ("dtype", "form")  # options that are about Ĉ and V
_SHARD_BYTES = 256 * 1024 * 1024  # of a thin cache a quarter, which is as many minutes of work
_DOMINANT_FROM = 512  # sides of V; below, all singular vectors take as long as a few
_BAR = "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]"


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    modules: names or last parts of names (``q_proj``); empty means all linear layers.
    dtype: of Ĉ or V in an exact cache. form: of them; ``auto`` takes dense where d_out ≤ d_in.
    max_energy: share of ‖V‖_F² up to which its singular vectors are kept; no policy can have more. Default:
    0.4; with ``exact`` 0.95.
    exact: keep Ĉ or V too. Without them a cache is thin: it has the bases and the figures.
    """

    modules: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    form: str = "auto"
    device: str = "cpu"
    max_energy: float = _BY_EXACT
    exact: bool = False

    def __post_init__(self) -> None:
        if self.max_energy is _BY_EXACT:
            object.__setattr__(self, "max_energy", EXACT_MAX_ENERGY if self.exact else MAX_ENERGY)
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
            UsageError: such as ``form`` without ``exact``.
        """
        for name in given:
            if not self.exact and name in _OF_OPERATORS:
                raise UsageError(
                    f"`{name}` has no effect without `exact`: it is about Ĉ and V, and a thin cache has "
                    f"neither. Add `exact`, or leave `{name}` out"
                )


def build(
    base: str | Path,
    aligned: str | Path,
    out: str | Path,
    options: BuildOptions | None = None,
    names: tuple[ModelName, ModelName] | None = None,
) -> Path:
    """Write the projector cache of a model pair to the folder ``out`` and return it.

    The folder appears when it is whole. A build that is killed, or fails after some shards, leaves a hidden
    folder. The next build of the same models with the same options goes on from there; one with other options
    removes it. Memory holds two modules and one shard, whatever the number of layers.

    names: of both models, where they are not those of the folders.

    Raises:
        CheckpointError: the models are not a pair, are identical, or hold non-finite weights.
        UsageError: ``out`` exists, another build of it is running, or the disk is full.
    """
    options = options or BuildOptions()
    out = Path(out)
    check_new(out)
    pair = Checkpoint(base), Checkpoint(aligned)
    modules = select_modules(*pair, options.modules)
    check_quantisation(*pair, modules, options.device)
    _check_different(*pair)
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial_cache(out, _key(pair, modules, options)) as partial:
        left = modules[len(partial.modules) + len(partial.unchanged) :]
        _check_disk(out.parent, pair[1], left, options)
        if partial.shards:
            finished = len(modules) - len(left)
            tqdm.write(f"continuing: {finished} of {len(modules)} modules are finished", file=sys.stderr)
        _add_modules(partial, pair, modules, left, options)
        if not partial.modules:
            raise _identical(*pair)
        write_samples(partial.folder, *pair)
        given = dict(zip(("base", "aligned"), names or map(ModelName.of, (base, aligned)), strict=True))
        models = json.dumps({side: asdict(name) for side, name in given.items()}, indent=1)
        partial.finish(out, {MANIFEST: _manifest(partial, pair, options), MODELS: models})
    return out


def _key(pair: tuple[Checkpoint, Checkpoint], names: list[str], options: BuildOptions) -> str:
    """A digest of all that the bytes of a cache depend on."""
    models = [[model.fingerprint(), model.file_states()] for model in pair]
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
    largest = _SHARD_BYTES // (1 if options.exact else 4)
    work = {name: operations(pair[1].tensors[f"{name}.weight"].shape) for name in names}
    tensors: dict[str, Tensor] = {}
    modules: list[dict[str, Any]] = []
    unchanged: list[str] = []

    def flush() -> None:
        partial.add(tensors, list(modules), list(unchanged))
        for collected in (tensors, modules, unchanged):
            collected.clear()

    with (
        weights_ahead(pair, left) as (base, aligned),
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
    sides, interrupted = ("base", "aligned"), threading.Event()
    with (
        ThreadPoolExecutor(len(sides)) as threads,
        tqdm(
            total=sum(len(model.tensors) for model in pair), desc="Digests of both models", unit="tensor"
        ) as bar,
    ):

        def counted(model: Checkpoint) -> Iterator[str]:
            for name in sorted(model.tensors):
                if interrupted.is_set():
                    return
                yield name
                bar.update()

        try:
            digests = list(threads.map(lambda model: model.digest(counted(model)), pair))
        except BaseException:
            interrupted.set()
            raise
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
        "dtype": options.dtype if options.exact else None,
        "max_energy": options.max_energy,
        "unchanged_modules": partial.unchanged,
        "shards": partial.shards,
        "modules": modules,
    }
    return json.dumps(manifest, indent=1, allow_nan=False)


def build_module(name: str, base: Weights, aligned: Weights, options: BuildOptions) -> Built | None:
    """Figures and tensors of one module, or None where alignment did not change it (V = 0).

    None too where W_aligned = 0: no adapter has a size relative to it.

    A thin cache needs only V's dominant directions: see `dominant`. Else, and where too many are dominant,
    the Gram matrix of V's smaller side gives everything: Ĉ where that side is the output, c₀, and the
    singular values and vectors. All in float64 before the cast.
    """
    weights = [model.linear(name).to(options.device) for model in (base, aligned)]
    if not options.exact and min(weights[0].shape) >= _DOMINANT_FROM:
        return thin_module(name, weights, options.max_energy)
    before, after = (weight.to(torch.float64) for weight in weights)
    weights.clear()
    aligned_norm = float(after.norm())
    delta = after - before
    del before, after
    form = options.form if options.exact else THIN
    return whole_module(name, delta, aligned_norm, form, DTYPES[options.dtype], options.max_energy)


def _check_disk(parent: Path, aligned: Checkpoint, names: list[str], options: BuildOptions) -> None:
    """Refuse a disk that is too small.

    How many singular vectors hold the energy is not known yet: at most its share of them, for the largest
    come first.
    """
    element = DTYPES[options.dtype].itemsize if options.exact else 0
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
