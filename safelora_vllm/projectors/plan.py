"""What a projector cache takes: on disk, and of a device for the parts that a policy reads.

Sizes come from shapes and numbers of directions. These are known from a cache, or are assumed of a model that
has none yet: see `assumed_spectrum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass

import torch
from tqdm import tqdm

from safelora_vllm.errors import PolicyError, ProjectorCacheError
from safelora_vllm.projectors import assumed_spectrum
from safelora_vllm.projectors.build import DTYPES, BuildOptions
from safelora_vllm.projectors.cache import ProjectorCache, columns_held
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.manifest import ENERGY_ROUNDING, THIN
from safelora_vllm.projectors.projector import Parts

_BASIS, _SHARE = torch.float32.itemsize, torch.float64.itemsize
# Of an H100 for the CUDA context, libraries and what torch's allocator keeps: the 1,600 MiB that a gate of
# Llama-2-7B's shapes took in all, less its projectors and the work of its largest group (benchmarks/results/
# gpu_check.json). Other cards and releases differ.
CONTEXT_BYTES = 1200 * 1024**2


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of the parts of a cache.

    Attributes:
        operator: Ĉ or V.
        input_basis: R.
        output_basis: L.
        energy: the shares of energy, which the gate keeps in host memory.
    """

    operator: int = 0
    input_basis: int = 0
    output_basis: int = 0
    energy: int = 0

    @property
    def total(self) -> int:
        """Of all parts."""
        return self.operator + self.input_basis + self.output_basis + self.energy

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class ModuleGroup:
    """Modules of one shape.

    Attributes:
        names: of the modules.
        shape: (d_out, d_in).
        form: ``dense`` (Ĉ is stored), ``factored`` (V is) or ``thin`` (neither is).
        kept: directions of R and L that the cache has of each module.
        input_directions: those of R that the policy reads.
        output_directions: those of L.
        disk: what the modules take in the cache.
        held: what the gate holds of them.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    form: str
    kept: tuple[int, ...]
    input_directions: tuple[int, ...]
    output_directions: tuple[int, ...]
    disk: CacheBytes
    held: CacheBytes

    @property
    def kinds(self) -> list[str]:
        """The last parts of the names, such as ``q_proj``."""
        return list(dict.fromkeys(name.rpartition(".")[2] for name in self.names))


@dataclass(frozen=True)
class Plan:
    """What a policy takes of disk, memory and time. Sizes are bytes.

    Attributes:
        groups: the modules by their shape.
        assumed: whether the spectrum is assumed, and not that of a projector cache.
        max_energy: the energy that the cache has, where it is planned.
        disk: what the projector cache takes.
        held: what the gate holds of it for the policy.
        disk_at_most: of a build whose V has no dominant directions at all.
        held_at_most: the same of `device_bytes`.
        lora_rank: of an adapter.
        adapter_uploaded: of an adapter of all modules at that rank, in float32.
        adapter_served: of the same in bfloat16.
        transient_bytes: what judging an adapter takes for a while.
        on_gpu: whether the gate is on a GPU.
        gpu_memory: of that GPU, if known.
        weight_bytes: of the aligned model.
        build_device: where the build was tried.
        build_seconds: an estimate of how long a build takes there, without the time of the disk.
    """

    groups: tuple[ModuleGroup, ...]
    assumed: bool
    max_energy: float | None
    disk: CacheBytes
    held: CacheBytes
    disk_at_most: int
    held_at_most: int
    lora_rank: int
    adapter_uploaded: int
    adapter_served: int
    transient_bytes: int
    on_gpu: bool
    gpu_memory: int | None
    weight_bytes: int
    build_device: str
    build_seconds: float

    @property
    def modules(self) -> int:
        """How many there are."""
        return sum(len(group.names) for group in self.groups)

    @property
    def device_bytes(self) -> int:
        """What the gate's projectors take of its device."""
        return self.held.total - (self.held.energy if self.on_gpu else 0)

    @property
    def context_bytes(self) -> int:
        """What is allowed for the CUDA context and libraries; 0 on a CPU."""
        return CONTEXT_BYTES if self.on_gpu else 0

    @property
    def gate_bytes(self) -> int:
        """What the gate takes of its device in all."""
        return self.device_bytes + self.transient_bytes + self.context_bytes

    @property
    def gpu_share(self) -> float | None:
        """The gate's share of the GPU's memory."""
        return self.gate_bytes / self.gpu_memory if self.gpu_memory else None

    @property
    def gpus(self) -> int | None:
        """The fewest GPUs that hold the model's weights, as tensor parallelism spreads them."""
        return max(1, math.ceil(self.weight_bytes / self.gpu_memory)) if self.gpu_memory else None

    @property
    def fits(self) -> bool | None:
        """Whether one GPU holds the gate beside its part of the weights."""
        if not self.gpu_memory or not self.gpus:
            return None
        return self.gate_bytes + self.weight_bytes / self.gpus <= self.gpu_memory


def groups_of_cache(cache: ProjectorCache, parts: Parts) -> list[ModuleGroup]:
    """What a cache has and what is read of it. Its shards are verified as their energies are read.

    Raises:
        PolicyError: the policy has more energy than the cache.
        ProjectorCacheError: the cache has no modules, or is damaged.
    """
    if not cache.modules:
        raise ProjectorCacheError(f"the projector cache {cache.folder} has no modules; build it again")
    operators = {name: cache.projector(name) for name in cache.modules}
    for operator in tqdm(operators.values(), desc="Energies", unit="module", delay=1.0):
        _ = operator.energies
    sizes, groups = cache.tensor_bytes(), []
    for names in cache.in_groups(cache.modules):
        entry = cache.modules[names[0]]
        key = {"dense": "projector", "factored": "delta"}.get(entry.form)
        group = _group(
            names,
            entry.shape,
            entry.form,
            [len(operators[name].energies) for name in names],
            [operators[name].directions(parts.input_energy) for name in names],
            [operators[name].directions(parts.output_energy) for name in names],
            sum(sizes[f"{name}.{key}"] for name in names) if key else 0,
            parts.operator,
        )
        groups.append(group)
    return groups


def assumed_groups(
    checkpoint: Checkpoint, names: Iterable[str], parts: Parts, options: BuildOptions
) -> list[ModuleGroup]:
    """What a build would make of some modules, if V is as assumed."""
    return _planned(checkpoint, names, parts, options, assumed_spectrum.directions)


def largest_groups(
    checkpoint: Checkpoint, names: Iterable[str], parts: Parts, options: BuildOptions
) -> list[ModuleGroup]:
    """The same where V has no dominant directions at all: no build takes more."""
    return _planned(checkpoint, names, parts, options, lambda shape, energy: math.ceil(energy * min(shape)))


def total(sizes: Iterable[CacheBytes]) -> CacheBytes:
    """Of several groups."""
    return sum(sizes, CacheBytes())


def _planned(
    checkpoint: Checkpoint, names: Iterable[str], parts: Parts, options: BuildOptions,
    directions: Callable[[tuple[int, int], float], int],
) -> list[ModuleGroup]:  # fmt: skip
    """Groups of the modules of a checkpoint, with the default dtype and form.

    Raises:
        PolicyError: the policy has more energy than the cache would have, or reads what it would lack.
        CheckpointError: a weight is quantised in a way that is not read.
    """
    max_energy = options.max_energy
    if options.thin and parts.operator:
        raise PolicyError(
            "with `thin` a cache would hold neither Ĉ nor V, and the policy reads one of them. Leave `thin` "
            "out, or take a policy that selects all modules and does not multiply by Ĉ"
        )
    wanted = max(parts.input_energy, parts.output_energy)
    if wanted > max_energy + ENERGY_ROUNDING:
        raise PolicyError(
            f"`energy` {wanted:g} is above the `max_energy` {max_energy:g} of the build. Give a `max_energy` "
            f"of {wanted:g} or more"
        )
    shapes: dict[tuple[int, int], list[str]] = {}
    for name in names:
        checkpoint.check_weight(name)
        rows, columns = checkpoint.tensors[f"{name}.weight"].shape
        shapes.setdefault((rows, columns), []).append(name)
    element, groups = DTYPES[options.dtype].itemsize, []
    for shape, alike in shapes.items():
        rows, columns = shape
        operator = 0 if options.thin else element * rows * min(rows, columns) * len(alike)
        form = THIN if options.thin else "dense" if rows <= columns else "factored"
        kept, inputs, outputs = (
            [directions(shape, energy)] * len(alike)
            for energy in (max_energy, parts.input_energy, parts.output_energy)
        )
        groups.append(_group(alike, shape, form, kept, inputs, outputs, operator, parts.operator))
    return groups


def _group(
    names: Sequence[str], shape: tuple[int, int], form: str, kept: Sequence[int], inputs: Sequence[int],
    outputs: Sequence[int], operator: int, reads_operator: bool,
) -> ModuleGroup:  # fmt: skip
    (rows, columns), count = shape, sum(kept)
    disk = CacheBytes(operator, _BASIS * columns * count, _BASIS * rows * count, _SHARE * count)
    held = CacheBytes(
        operator if reads_operator else 0,
        _BASIS * columns * sum(columns_held(inputs, kept)),
        _BASIS * rows * sum(columns_held(outputs, kept)),
        disk.energy,
    )
    return ModuleGroup(tuple(names), shape, form, tuple(kept), tuple(inputs), tuple(outputs), disk, held)
