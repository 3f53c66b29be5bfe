"""What a policy takes of disk, memory and time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from safelora_vllm.api.opened import opened_cache, usable_device
from safelora_vllm.errors import CheckpointError, ProjectorCacheError, UsageError
from safelora_vllm.methods.judge import working_bytes
from safelora_vllm.methods.reads import check_parts, parts_read
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.build import BuildOptions
from safelora_vllm.projectors.build_time import estimated_seconds
from safelora_vllm.projectors.cache import ProjectorCache, basis_bytes
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.plan import Plan, assumed_groups, groups_of_cache, largest_groups, total
from safelora_vllm.projectors.selection import select_modules


def plan_projectors(
    aligned: str | os.PathLike[str],
    policy: Policy | None = None,
    *,
    projectors: str | os.PathLike[str] | ProjectorCache | None = None,
    modules: Sequence[str] = (),
    max_energy: float | None = None,
    thin: bool = False,
    lora_rank: int = 16,
    gpu_memory: int | None = None,
    device: str = "cpu",
) -> Plan:
    """What a policy takes of disk, memory and time, before anything is built. No weights are read.

    Without a projector cache the spectrum of V is assumed: V = G diag(j^-0.4), G Gaussian.

    Args:
        aligned: folder of the model that is to be served. Its safetensors files may end after their headers.
        policy: the rules of the gate. None: the default policy.
        projectors: a projector cache of the model, or its folder, whose own spectra are taken.
        modules: as for `build_projectors`.
        max_energy: as for `build_projectors`. None: its default.
        thin: as for `build_projectors`.
        lora_rank: of an adapter, the largest that the server accepts.
        gpu_memory: bytes of the GPU that the gate is on. None: that of the GPU which torch sees, if any.
        device: where the build would compute. One small module is built there, for the estimate of its time.

    Returns:
        Bytes by part, in all and at most, and seconds of a build.

    Raises:
        CheckpointError: there is no checkpoint in the folder, or none with such modules.
        PolicyError: the policy has more energy than the cache, reads what a thin one lacks, or has a field
            without effect.
        ProjectorCacheError: the cache is missing, damaged or of another model.
        UsageError: ``device`` or another argument is not usable.

    Example:
        >>> import safelora_vllm as sl
        >>> plan = sl.plan_projectors("models/aligned", projectors="projectors")
        >>> plan.modules, plan.held.operator, plan.disk.operator
        (14, 0, 458752)
    """
    policy = policy or Policy()
    policy.check_effective(policy.chosen)
    if lora_rank < 1:
        raise UsageError(f"`lora_rank` is {lora_rank}: expected 1 or more")
    if gpu_memory is not None and gpu_memory < 1:
        raise UsageError(f"`gpu_memory` is {gpu_memory}: expected more than 0")
    if projectors is not None and (modules or thin or max_energy is not None):
        raise UsageError(
            "`modules`, `max_energy` and `thin` have no effect with a projector cache, which has its own. "
            "Leave them or the cache out"
        )
    options = BuildOptions(tuple(modules), device=str(usable_device(device)), thin=thin)
    if max_energy is not None:
        options = dataclasses.replace(options, max_energy=max_energy)
    if not Path(aligned).is_dir():
        raise CheckpointError(
            f"{os.fspath(aligned)} is not a folder: expected the folder of the aligned model"
        )
    checkpoint, parts = Checkpoint(os.fspath(aligned), whole=False), parts_read(policy)
    names = select_modules(checkpoint, checkpoint, options.modules)
    if projectors is None:
        groups = assumed_groups(checkpoint, names, parts, options)
        most = largest_groups(checkpoint, names, parts, options)
    else:
        cache = opened_cache(projectors)
        _check_modules(cache, checkpoint, names)
        check_parts(policy, cache)
        groups = most = groups_of_cache(cache, parts)
    if gpu_memory is None:
        gpu_memory = _gpu_memory(options.device)
    on_gpu = gpu_memory is not None or torch.device(options.device).type != "cpu"
    shapes = {group.shape: len(group.names) for group in groups}
    factors = lora_rank * sum(count * sum(shape) for shape, count in shapes.items())
    gate_device = torch.device("cuda" if on_gpu else "cpu")
    bases = {g.shape: basis_bytes(g.shape, max(g.input_directions), max(g.output_directions)) for g in groups}
    disk = total(group.disk for group in groups)
    weights = sum(info.nbytes for info in checkpoint.tensors.values())
    held_most = total(group.held for group in most)
    return Plan(
        groups=tuple(groups),
        assumed=projectors is None,
        max_energy=options.max_energy if projectors is None else None,
        disk=disk,
        held=total(group.held for group in groups),
        disk_at_most=total(group.disk for group in most).total,
        held_at_most=held_most.total - (held_most.energy if on_gpu else 0),
        lora_rank=lora_rank,
        adapter_uploaded=factors * torch.float32.itemsize,
        adapter_served=factors * torch.bfloat16.itemsize,
        transient_bytes=working_bytes(shapes, lora_rank, policy, gate_device, bases),
        on_gpu=on_gpu,
        gpu_memory=gpu_memory,
        weight_bytes=weights,
        build_device=options.device,
        build_seconds=estimated_seconds(shapes, 2 * weights + disk.total, options.device, options.max_energy),
    )


def _check_modules(cache: ProjectorCache, checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Refuse a cache with modules that a checkpoint has not, or has in another shape."""
    shapes = {name: checkpoint.tensors[f"{name}.weight"].shape for name in names}
    for name, entry in cache.modules.items():
        if shapes.get(name) != entry.shape:
            found = f"has {name} as {shapes[name]}" if name in shapes else f"has no linear layer {name}"
            raise ProjectorCacheError(
                f"the projector cache {cache.folder} was made for another model: it has {name} as "
                f"{entry.shape}, {checkpoint.folder} {found}. Give the model that the cache was built from"
            )


def _gpu_memory(device: str) -> int | None:
    """Bytes of the GPU that is meant, or else seen; None if there is none."""
    if not torch.cuda.is_available():
        return None
    meant = torch.device(device)
    return int(torch.cuda.get_device_properties(meant if meant.type == "cuda" else 0).total_memory)
