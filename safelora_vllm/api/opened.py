"""What the functions of the API are given, opened: a projector cache, a device, the settings of a gate."""

from __future__ import annotations

import dataclasses
import logging
import os

import torch

from safelora_vllm.errors import UsageError
from safelora_vllm.gate.admit import GateSettings
from safelora_vllm.methods.reads import check_energy, truncation
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.checkpoint import ModelName

logger = logging.getLogger("vllm.safelora.api")


def gate_settings(
    projectors: str | os.PathLike[str] | ProjectorCache, policy: Policy | None, device: str
) -> GateSettings:
    """A gate's settings of what a caller gave.

    Raises:
        PolicyError, ProjectorCacheError, UsageError: as the functions of the API say.
    """
    policy = Policy() if policy is None else policy
    if not isinstance(policy, Policy):
        raise UsageError(
            f"`policy` is of type {type(policy).__name__}: expected a Policy, such as Policy(energy=0.1)"
        )
    policy.check_effective(policy.chosen)
    if policy.opinion:
        logger.warning(
            "the policy's `opinion` has no effect here: only a server asks the aligned model at each "
            "request. To have a second opinion, upload the adapter to a server"
        )
    cache = opened_cache(projectors)
    check_energy(policy, cache)
    return GateSettings(cache, policy, usable_device(device))


def with_base_model(settings: GateSettings, base_model: str | os.PathLike[str] | None) -> GateSettings:
    """The same settings with the model that new adapters name; by default the cache's aligned model."""
    model = settings.cache.aligned_model if base_model is None else ModelName.of(os.fspath(base_model))
    if model is None:
        logger.warning(
            "the new adapter names no model, so AutoPeftModelForCausalLM cannot load it: the projector cache "
            "does not record the aligned model. Name it with `base_model`"
        )
        return settings
    return dataclasses.replace(settings, base_model=model.name, revision=model.revision)


def opened_cache(projectors: str | os.PathLike[str] | ProjectorCache) -> ProjectorCache:
    """A cache that is opened already, or that of a folder."""
    return projectors if isinstance(projectors, ProjectorCache) else ProjectorCache(os.fspath(projectors))


def usable_device(name: str) -> torch.device:
    """A device that torch can use here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"torch cannot use the `device` {name!r} here; try cpu") from error


def warn_of_truncation(policy: Policy, cache: ProjectorCache | None) -> None:
    """Say what a policy loses by a thin cache; see `truncation`."""
    if lost := truncation(policy, cache):
        logger.warning("%s", lost)
