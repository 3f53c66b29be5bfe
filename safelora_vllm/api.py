"""The Python API: projector caches, and adapters through the gate, without a server.

Everything here is also exported by the package itself::

    import safelora_vllm as sl

The commands ``build``, ``plan``, ``inspect``, ``project`` and ``calibrate`` only parse options and print.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from safelora_vllm.adapters.read import read_adapter
from safelora_vllm.errors import AdapterRefused, CheckpointError, ProjectorCacheError, UsageError
from safelora_vllm.gate.admit import GateSettings, admit, evaluate
from safelora_vllm.methods.calibration import Calibration, calibrate, calibrator_of, search_of
from safelora_vllm.methods.judge import working_bytes
from safelora_vllm.methods.reads import check_parts, parts_read
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.build_time import estimated_seconds
from safelora_vllm.projectors.cache import ProjectorCache, basis_bytes
from safelora_vllm.projectors.checkpoint import Checkpoint, ModelName
from safelora_vllm.projectors.plan import Plan, assumed_groups, groups_of_cache, largest_groups, total
from safelora_vllm.projectors.selection import select_modules
from safelora_vllm.report import Report
from safelora_vllm.store import PublishedStore

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger("vllm.safelora.api")


def build_projectors(
    base: str | os.PathLike[str],
    aligned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    modules: Sequence[str] = (),
    dtype: str = "bfloat16",
    form: str = "auto",
    device: str = "cpu",
    max_energy: float | None = None,
    thin: bool = False,
) -> ProjectorCache:
    """Build the projector cache of a model pair. Memory holds one module at a time.

    Args:
        base: the model before alignment: a folder with safetensors weights, or a hub id.
        aligned: the model that is served: the same.
        out: a new folder. It appears when the cache is whole.
        modules: names of linear layers or last parts of names, such as ``q_proj``. Empty: all of them.
        dtype: of the projectors: ``float32``, ``bfloat16`` or ``float16``.
        form: ``dense`` stores Ĉ (d_out, d_out), ``factored`` V (d_out, d_in), ``auto`` what is smaller.
        device: where to compute, such as ``cuda``.
        max_energy: the largest energy that a policy may have, a share of ‖V‖_F² above 0 and up to 1. None:
            0.95, or 0.4 with ``thin``.
        thin: keep neither Ĉ nor V. Policies of method ``safe-lora``, and those that select by threshold or
            number, need one of them. ``dtype`` and ``form`` have no effect then. ``max_energy`` is then twice
            the default policy's energy by default, since directions above it take most of the room.

    Returns:
        The cache, opened.

    Raises:
        CheckpointError: the models are not a pair, are identical, or hold non-finite weights.
        UsageError: ``out`` exists, the disk is full, or an option is out of range or without effect.

    Example:
        >>> import safelora_vllm as sl
        >>> cache = sl.build_projectors("models/base", "models/aligned", "new-projectors")
        >>> len(cache.modules), cache.modules["model.layers.0.self_attn.q_proj"].shape
        (14, (96, 96))
    """
    energy = {} if max_energy is None else {"max_energy": max_energy}
    options = BuildOptions(tuple(modules), dtype, form, str(_device(device)), thin=thin, **energy)
    return ProjectorCache(build(os.fspath(base), os.fspath(aligned), os.fspath(out), options))


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
    options = BuildOptions(tuple(modules), device=str(_device(device)), thin=thin)
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
        cache = _cache(projectors)
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


def inspect_adapter(
    adapter: str | os.PathLike[str] | PeftModel,
    projectors: str | os.PathLike[str] | ProjectorCache,
    policy: Policy | None = None,
    *,
    device: str = "cpu",
) -> Report:
    """What the gate says about an adapter. Nothing is written.

    Args:
        adapter: a folder that PEFT saved, a .tar, .tar.gz or .zip of one, or a live ``peft.PeftModel``,
            whose active adapter is judged.
        projectors: a projector cache, or its folder.
        policy: the rules to judge it by. None: the default policy.
        device: where to project, such as ``cuda``.

    Returns:
        The report, whatever the answer: ``report.accepted``, ``report.reasons`` and ``report.modules``.

    Raises:
        AdapterNotFound: there is nothing at the path.
        UsageError: ``adapter`` or ``device`` is not usable.
        PolicyError: the policy needs more than the cache has, or has a field without effect.
        ProjectorCacheError: the cache is missing or damaged.

    Example:
        >>> import safelora_vllm as sl
        >>> report = sl.inspect_adapter("my-adapter", "projectors", policy=sl.Policy(method="safe-lora"))
        >>> report.accepted, report.count("projected"), len(report.modules)
        (True, 11, 14)
        >>> report = sl.inspect_adapter("bad-adapter", "projectors")
        >>> report.accepted, [reason.code for reason in report.reasons]
        (False, ['dora'])
    """
    settings = _settings(projectors, policy, device)
    with _on_disk(adapter) as (path, name):
        try:
            return evaluate(read_adapter(path, settings.limits), name, settings)[0]
        except AdapterRefused as error:
            return Report.refused(name, "", settings.cache.id, settings.policy, error)


def project_adapter(
    adapter: str | os.PathLike[str] | PeftModel,
    projectors: str | os.PathLike[str] | ProjectorCache,
    out: str | os.PathLike[str],
    policy: Policy | None = None,
    *,
    device: str = "cpu",
    base_model: str | os.PathLike[str] | None = None,
) -> Report:
    """Pass an adapter through the gate and write what may be served, as PEFT would.

    Args:
        adapter: as for `inspect_adapter`.
        projectors: a projector cache, or its folder.
        out: a new folder for ``adapter_config.json``, ``adapter_model.safetensors`` and ``report.json``.
        policy: the rules to judge it by. None: the default policy. With mode ``report-only`` the adapter is
            written unprojected.
        device: where to project, such as ``cuda``.
        base_model: the model of the new adapter, a folder or a hub id, which PEFT's
            ``AutoPeftModelForCausalLM`` loads. None: the aligned model, as `build_projectors` was given it.
            What the adapter itself names is never taken over: its author would choose what is loaded.

    Returns:
        The report of the adapter, which was accepted.

    Raises:
        AdapterRefused: the gate refuses it; nothing was written. `inspect_adapter` has the report.
        AdapterNotFound: there is nothing at the path.
        UsageError: ``out`` exists or cannot be written, or ``adapter`` or ``device`` is not usable.
        PolicyError: the policy needs more than the cache has, or has a field without effect.
        ProjectorCacheError: the cache is missing or damaged.

    Example:
        >>> import safelora_vllm as sl
        >>> report = sl.project_adapter("my-adapter", "projectors", "projected")
        >>> report.accepted, report.modules[0].name, report.modules[0].decision
        (True, 'model.layers.0.mlp.down_proj', 'projected')
        >>> try:
        ...     sl.project_adapter("bad-adapter", "projectors", "never-written")
        ... except sl.AdapterRefused as error:
        ...     print(error.codes)
        ['dora']
    """
    out = Path(out)
    if out.exists():
        raise UsageError(f"{out} exists: remove it, or give another folder as `out`")
    settings = _settings(projectors, policy, device)
    model = settings.cache.aligned_model if base_model is None else ModelName.of(os.fspath(base_model))
    if model is not None:
        settings = dataclasses.replace(settings, base_model=model.name, revision=model.revision)
    with _on_disk(adapter) as (path, name), _beside(out) as scratch:
        admission = admit(path, name, settings, PublishedStore(scratch))
        if admission.folder is None:
            raise AdapterRefused(admission.report.reasons)
        shutil.move(admission.folder, out)
    if model is None:
        logger.warning(
            "the new adapter names no model, so AutoPeftModelForCausalLM cannot load it: the projector cache "
            "does not record the aligned model. Name it with `base_model`"
        )
    return admission.report


def calibrate_policy(
    projectors: str | os.PathLike[str] | ProjectorCache,
    policy: Policy | None = None,
    *,
    keep_random: float | None = None,
) -> Calibration:
    """What a policy does to a random adapter, from the projector cache alone.

    Args:
        projectors: a projector cache, or its folder.
        policy: which method, on which modules, how strong. None: the default policy.
        keep_random: find the method's largest strength that leaves every module this share of a random
            adapter's effect, from 0 to 1.

    Returns:
        The effect by module type and on all modules, and a ladder of strengths.

    Raises:
        UsageError: the method cannot be calibrated, or no strength keeps the share.
        PolicyError: the policy has more energy than the cache, or a field without effect.
        ProjectorCacheError: the cache is missing, empty or damaged.

    Example:
        >>> import safelora_vllm as sl
        >>> found = sl.calibrate_policy("projectors", keep_random=0.9)
        >>> found.policy.energy, found.whole.effect_kept > 0.9
        (0.29, True)
    """
    policy = policy or Policy()
    policy.check_effective(policy.chosen)
    calibrator_of(policy.method)  # before anything is read
    if keep_random is not None:
        search_of(policy.method)
    cache = _cache(projectors)
    if not cache.modules:
        raise ProjectorCacheError(f"the projector cache {cache.folder} has no modules; build it again")
    operators = [cache.projector(name) for name in cache.modules]
    if policy.has_effect("energy"):  # read what the figures need, once: some kilobytes a module
        for operator in tqdm(operators, desc="Energies", unit="module", delay=1.0):
            _ = operator.energies
    return calibrate(operators, policy, keep_random)


def _settings(
    projectors: str | os.PathLike[str] | ProjectorCache, policy: Policy | None, device: str
) -> GateSettings:
    policy = policy or Policy()
    policy.check_effective(policy.chosen)
    cache = _cache(projectors)
    check_parts(policy, cache)
    return GateSettings(cache, policy, _device(device))


def _cache(projectors: str | os.PathLike[str] | ProjectorCache) -> ProjectorCache:
    return projectors if isinstance(projectors, ProjectorCache) else ProjectorCache(os.fspath(projectors))


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


def _device(name: str) -> torch.device:
    """A device that torch can use here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"torch cannot use the `device` {name!r} here; try cpu") from error


@contextlib.contextmanager
def _on_disk(adapter: str | os.PathLike[str] | PeftModel) -> Iterator[tuple[str, str]]:
    """The path of an adapter and its name; a live one is saved to a temporary folder first."""
    if isinstance(adapter, str | os.PathLike):
        path = os.fspath(adapter)
        yield path, Path(path).resolve().name
        return
    name = _active(adapter)
    with tempfile.TemporaryDirectory(prefix="safelora-") as folder:
        adapter.save_pretrained(folder, selected_adapters=[name])
        saved = Path(folder) if name == "default" else Path(folder, name)  # as PEFT does
        yield str(saved), name


def _active(model: PeftModel) -> str:
    """The name of a live model's one active adapter.

    Raises:
        UsageError: it is not a ``peft.PeftModel``, or several of its adapters are active.
    """
    peft = sys.modules.get("peft")  # where nobody imported it, nothing is a PeftModel
    if peft is None or not isinstance(model, peft.PeftModel):
        raise UsageError(
            f"an object of type {type(model).__name__} is not a valid adapter: expected the path of a folder "
            "or an archive, or a peft.PeftModel"
        )
    if len(names := model.active_adapters) != 1:
        raise UsageError(f"the model's active adapters are {names}: expected one; call its set_adapter first")
    return str(names[0])


@contextlib.contextmanager
def _beside(out: Path) -> Iterator[str]:
    """A temporary folder on the disk of ``out``."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=out.parent, prefix=".project-")
    except OSError as error:
        raise UsageError(
            f"{out.parent} cannot be written ({error.strerror}): give another folder as `out`"
        ) from error
    with scratch as folder:
        yield folder
