"""What a projector cache takes: on disk, and of a device for the parts that a policy reads.

Sizes come from shapes and numbers of directions. These are known from a cache, or are assumed of a model that
has none yet: see `assumed_spectrum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from safelora_vllm.errors import PolicyError
from safelora_vllm.projectors import assumed_spectrum
from safelora_vllm.projectors.build import DTYPES, BuildOptions
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.manifest import ENERGY_ROUNDING, THIN, WHOLE
from safelora_vllm.projectors.placement import Placement
from safelora_vllm.projectors.projector import Parts
from safelora_vllm.projectors.sizes import CacheBytes, ModuleGroup, module_group

# Of an H100 for the CUDA context, libraries and what torch's allocator keeps: the 1,600 MiB that a gate of
# Llama-2-7B's shapes took in all, less its projectors and the work of its largest group (benchmarks/results/
# gpu_check.json). Other cards and releases differ.
CONTEXT_BYTES = 1200 * 1024**2


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
        placement: where the gate's projectors are, and what judging an adapter takes.
        least_bytes: the smallest ``projector_memory`` of a gate.
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
    placement: Placement
    least_bytes: int
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
        return self.placement.device_bytes

    @property
    def transient_bytes(self) -> int:
        """What judging an adapter takes of it for a while, at most."""
        return self.placement.transient

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


def _planned(
    checkpoint: Checkpoint, names: Iterable[str], parts: Parts, options: BuildOptions,
    directions: Callable[[tuple[int, int], float], int],
) -> list[ModuleGroup]:  # fmt: skip
    """Groups of the modules of a checkpoint, with the default dtype and form.

    Raises:
        PolicyError: the policy has more energy than the cache would have.
        CheckpointError: a weight is quantised in a way that is not read.
    """
    max_energy = options.max_energy
    wanted = max(energy for energy in (parts.input_energy, parts.output_energy) if energy != WHOLE)
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
        operator = element * rows * min(rows, columns) * len(alike) if options.exact else 0
        form = THIN if not options.exact else "dense" if rows <= columns else "factored"
        kept, inputs, outputs = (
            [directions(shape, min(energy, max_energy))] * len(alike)
            for energy in (max_energy, parts.input_energy, parts.output_energy)
        )
        shares = torch.float64.itemsize * sum(kept)
        groups.append(
            module_group(alike, shape, form, kept, inputs, outputs, operator, parts.operator, shares)
        )
    return groups
