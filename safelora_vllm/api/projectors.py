"""Projector caches: building one, and what policies do to random adapters by it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from tqdm import tqdm

from safelora_vllm.api.opened import opened_cache, usable_device, warn_of_truncation
from safelora_vllm.errors import UsageError
from safelora_vllm.files import check_new
from safelora_vllm.methods.calibration import Calibration, calibrate, calibrator_of, search_of
from safelora_vllm.methods.reads import naming_default
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.build import BuildOptions, build
from safelora_vllm.projectors.cache import ProjectorCache, check_not_empty
from safelora_vllm.projectors.checkpoint import ModelName
from safelora_vllm.remote.model import models_on_disk


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
    exact: bool = False,
) -> ProjectorCache:
    """Build the projector cache of a model pair, or go on with a build of it that was killed.

    Memory holds two modules and a part of the cache, whatever the number of layers.

    A cache is thin by default: it holds the bases of V up to an energy. Every policy works with it. What it
    does not know of a similarity or of Ĉ makes the gate stricter, never more lenient.

    Args:
        base: the model before alignment: a folder with safetensors weights, a hub id, or the ``s3://``,
            ``gs://``, ``az://`` or ``https://`` address of such a folder. It is downloaded beside ``out``.
        aligned: the model that is served: the same.
        out: a new folder. It appears when the cache is whole.
        modules: names of linear layers or last parts of names, such as ``q_proj``. Empty: all of them.
        dtype: of Ĉ or V: ``float32``, ``bfloat16`` or ``float16``. For ``exact`` only.
        form: ``dense`` stores Ĉ (d_out, d_out), ``factored`` V (d_out, d_in), ``auto`` what is smaller. For
            ``exact`` only.
        device: where to compute, such as ``cuda``.
        max_energy: the largest energy that a policy may have, a share of ‖V‖_F² above 0 and up to 1. None:
            0.4, twice the default policy's energy, since directions above it take most of the room; with
            ``exact`` 0.95.
        exact: keep Ĉ or V too. Then ``safe-lora`` multiplies by Ĉ itself, and policies that select by
            threshold or number compare exact similarities, as in the paper.

    Returns:
        The cache, opened.

    Raises:
        CheckpointError: the models are not a pair, are identical, or hold non-finite weights.
        UsageError: ``out`` exists, another build of it is running, the disk is full, or an option is out of
            range or without effect.

    Example:
        >>> import safelora_vllm as sl
        >>> cache = sl.build_projectors("models/base", "models/aligned", "new-projectors")
        >>> len(cache.modules), cache.modules["model.layers.0.self_attn.q_proj"].shape
        (14, (96, 96))
    """
    energy = {} if max_energy is None else {"max_energy": max_energy}
    options = BuildOptions(tuple(modules), dtype, form, str(usable_device(device)), exact=exact, **energy)
    given, folder = (os.fspath(base), os.fspath(aligned)), Path(out)
    check_new(folder)  # before anything is downloaded
    names = ModelName.of(given[0]), ModelName.of(given[1])
    with models_on_disk(*given, folder) as (before, after):
        return ProjectorCache(build(before, after, folder, options, names))


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
        UsageError: the method cannot be calibrated, nothing is selected, or no strength keeps the share.
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
    if policy.select == "none":
        raise UsageError(
            "with `select` 'none' nothing is projected, so there is nothing to calibrate: leave `select` out"
        )
    calibrator_of(policy.method)  # before anything is read
    if keep_random is not None:
        search_of(policy.method)
    cache = opened_cache(projectors)
    check_not_empty(cache)
    operators = [cache.projector(name) for name in cache.modules]
    if policy.has_effect("energy") or cache.thin:  # read what the figures need, once: some kilobytes a module
        for operator in tqdm(operators, desc="Energies", unit="module", delay=1.0):
            _ = operator.energies
    warn_of_truncation(policy, cache)
    with naming_default(policy) if keep_random is None else nullcontext():
        return calibrate(operators, policy, keep_random)
