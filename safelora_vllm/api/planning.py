"""What a policy takes of disk, memory and time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from safelora_vllm.api.opened import opened_cache, usable_device, warn_of_truncation
from safelora_vllm.errors import CheckpointError, ProjectorCacheError, UsageError
from safelora_vllm.gate.memory import placed
from safelora_vllm.methods.reads import check_energy, naming_default, parts_read
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.build import BuildOptions
from safelora_vllm.projectors.build_time import estimated_seconds
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.plan import Plan, assumed_groups, largest_groups
from safelora_vllm.projectors.selection import select_modules
from safelora_vllm.projectors.sizes import ModuleGroup, groups_of_cache, total


def plan_projectors(
    aligned: str | os.PathLike[str],
    policy: Policy | None = None,
    *,
    projectors: str | os.PathLike[str] | ProjectorCache | None = None,
    modules: Sequence[str] = (),
    max_energy: float | None = None,
    exact: bool = False,
    lora_rank: int = 16,
    gpu_memory: int | None = None,
    device: str = "cpu",
    projector_memory: int | None = None,
    projector_host_memory: int = 0,
) -> Plan:
    """What a policy takes of disk, memory and time, before anything is built. No weights are read.

    Without a projector cache the spectrum of V is assumed: V = G diag(j^-0.4), G Gaussian.

    Args:
        aligned: folder of the model that is to be served. Its safetensors files may end after their headers.
        policy: the rules of the gate. None: the default policy.
        projectors: a projector cache of the model, or its folder, whose own spectra are taken.
        modules: as for `build_projectors`.
        max_energy: as for `build_projectors`. None: its default.
        exact: as for `build_projectors`.
        lora_rank: of an adapter, the largest that the server accepts.
        gpu_memory: bytes of the GPU that the gate is on. None: that of the GPU which torch sees, if any.
        device: where the build would compute. One small module is built there, for the estimate of its time.
        projector_memory: the server's setting. None: as much as the policy takes.
        projector_host_memory: the server's setting.

    Returns:
        Bytes by part, in all and at most, and seconds of a build.

    Raises:
        CheckpointError: there is no checkpoint in the folder, or none with such modules.
        PolicyError: the policy has more energy than the cache, or a field without effect.
        ProjectorCacheError: the cache is missing or damaged, or its modules have other names or shapes.
        UsageError: ``device`` or another argument is not usable, or the memory is too little.

    Example:
        >>> import safelora_vllm as sl
        >>> plan = sl.plan_projectors("models/aligned", projectors="projectors")
        >>> plan.modules, plan.held.operator, plan.disk.operator
        (14, 0, 458752)
    """
    policy = policy or Policy()
    policy.check_effective(policy.chosen)
    for name, value in (("lora_rank", lora_rank), ("gpu_memory", gpu_memory)):
        if value is not None and value < 1:
            raise UsageError(f"`{name}` is {value}: expected 1 or more")
    if projectors is not None and (modules or exact or max_energy is not None):
        raise UsageError(
            "`modules`, `max_energy` and `exact` have no effect with a projector cache, which has its own. "
            "Leave them or the cache out"
        )
    options = BuildOptions(tuple(modules), device=str(usable_device(device)), exact=exact)
    if max_energy is not None:
        options = dataclasses.replace(options, max_energy=max_energy)
    if not Path(aligned).is_dir():
        raise CheckpointError(
            f"{os.fspath(aligned)} is not a folder: expected the folder of the aligned model"
        )
    checkpoint = Checkpoint(os.fspath(aligned), whole=False)
    names = select_modules(checkpoint, checkpoint, options.modules)
    if projectors is None:
        groups, most = _assumed(checkpoint, names, policy, options)
    else:
        groups = most = _of_cache(opened_cache(projectors), checkpoint, names, policy)
    if gpu_memory is None:
        gpu_memory = _gpu_memory(options.device)
    on_gpu = gpu_memory is not None or torch.device(options.device).type != "cpu"
    shapes = {group.shape: len(group.names) for group in groups}
    factors = lora_rank * sum(count * sum(shape) for shape, count in shapes.items())
    gate_device = torch.device("cuda" if on_gpu else "cpu")
    disk = total(group.disk for group in groups)
    weights = sum(info.nbytes for info in checkpoint.tensors.values())
    memory = projector_memory, projector_host_memory
    demand, placement = placed(groups, policy, gate_device, lora_rank, *memory)
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
        placement=placement,
        least_bytes=demand.least,
        on_gpu=on_gpu,
        gpu_memory=gpu_memory,
        weight_bytes=weights,
        build_device=options.device,
        build_seconds=estimated_seconds(shapes, 2 * weights + disk.total, options),
    )


def _assumed(
    checkpoint: Checkpoint, names: Sequence[str], policy: Policy, options: BuildOptions
) -> tuple[list[ModuleGroup], list[ModuleGroup]]:
    """Of the assumed spectrum, and of the flattest one: what a policy takes at most."""
    parts = parts_read(policy, thin=not options.exact)
    with naming_default(policy):
        groups = assumed_groups(checkpoint, names, parts, options)
        most = largest_groups(checkpoint, names, parts, options)
    if not options.exact:
        warn_of_truncation(policy, None)
    return groups, most


def _of_cache(
    cache: ProjectorCache, checkpoint: Checkpoint, names: Sequence[str], policy: Policy
) -> list[ModuleGroup]:
    """Of a cache's own spectra."""
    _check_modules(cache, checkpoint, names)
    check_energy(policy, cache)
    groups = groups_of_cache(cache, parts_read(policy, cache.thin))
    warn_of_truncation(policy, cache)
    return groups


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
