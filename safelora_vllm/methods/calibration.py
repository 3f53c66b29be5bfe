"""What a policy does to a random adapter, from a projector cache alone.

The rows of a random A are isotropic in d_in dimensions and the columns of a random B in d_out. Each method's
file says what it leaves of such an adapter, per module and in expectation.

A trained adapter is not random: these figures say what a policy costs an adapter that knows nothing of V,
not what it does to a harmful one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_vllm.errors import ProjectorCacheError, UsageError
from safelora_vllm.methods import METHODS
from safelora_vllm.methods.method import Calibrator, Effect, Search
from safelora_vllm.methods.selection import Interval
from safelora_vllm.projectors.manifest import WHOLE, ModuleEntry

if TYPE_CHECKING:
    from safelora_vllm.policy import Policy
    from safelora_vllm.projectors.cache import Projector


@dataclass(frozen=True)
class Calibration:
    """A policy's effect on a random adapter.

    Attributes:
        policy: the calibrated one.
        types: the last part of the modules' names → effect.
        whole: the effect on all modules.
        strength: the policy's field that differs in the ladder.
        ladder: policies of rising strength with their effect on all modules.
        limited_by_cache: the strength was searched, and the cache can serve no larger one.
    """

    policy: Policy
    types: dict[str, Effect]
    whole: Effect
    strength: str
    ladder: list[tuple[Policy, Effect]]
    limited_by_cache: bool = False


def calibrate(
    projectors: Sequence[Projector], policy: Policy, keep_random: float | None = None
) -> Calibration:
    """The policy's effect by module type, and that of a ladder of strengths.

    Args:
        projectors: of all modules of a cache.
        policy: which method, on which modules, how strong.
        keep_random: the share of a random adapter's effect that every module has to keep. The largest
            strength that does replaces the policy's.

    Raises:
        UsageError: the method cannot be calibrated, the cache does not keep the policy's energy, or no
            strength keeps the share.
        ProjectorCacheError: the cache is damaged.
    """
    calibrator, limited = calibrator_of(policy.method), False
    for projector in projectors:
        _check_figures(projector.entry)
    if keep_random is not None:
        search = search_of(policy.method)
        found = search.find(keep_random, projectors)
        policy = policy.with_values({search.field: found})
        limited = found == search.largest(projectors) < 1.0

    similarities = {p.entry.name: _similarity(p) for p in projectors}

    def effect(some: Sequence[Projector], rules: Policy) -> Effect:
        return calibrator.effect(some, rules.selects(similarities).projected, rules)

    groups: dict[str, list[Projector]] = {}
    for projector in projectors:
        groups.setdefault(projector.entry.name.rpartition(".")[2], []).append(projector)
    strength, rungs = calibrator.ladder(projectors, policy)
    return Calibration(
        policy=policy,
        types={name: effect(group, policy) for name, group in groups.items()},
        whole=effect(projectors, policy),
        strength=strength,
        ladder=[(rung, effect(projectors, rung)) for rung in rungs],
        limited_by_cache=limited,
    )


def calibrator_of(name: str) -> Calibrator:
    """How the method of that name is calibrated.

    Raises:
        UsageError: its file does not say what it does to a random adapter.
    """
    known = {method.name: method.calibrator for method in METHODS.values() if method.calibrator}
    if name not in known:
        raise UsageError(
            f"method {name!r} cannot be calibrated from the projector cache; calibrate knows "
            f"{', '.join(known)}. For others compare adapters of your own with 'safelora-vllm inspect'"
        )
    return known[name]


def search_of(name: str) -> Search:
    """How the strength of that method is found for a share that has to be kept.

    Raises:
        UsageError: it has none.
    """
    if (search := calibrator_of(name).search) is None:
        known = [m.name for m in METHODS.values() if m.calibrator and m.calibrator.search]
        raise UsageError(
            f"`keep_random` has no effect with `method` {name!r}: it finds the strength of "
            f"{' or '.join(map(repr, known))}. Leave `method` or `keep_random` out"
        )
    return search


def _similarity(projector: Projector) -> Interval:
    """What the gate knows of a random adapter's similarity: c₀, or the interval that a thin cache gives."""
    from safelora_vllm.methods.certified import null_interval

    if projector.exact:
        return Interval.exact(projector.entry.null_similarity)
    return null_interval(projector.spectrum(WHOLE), projector.entry.shape[0])


def _check_figures(entry: ModuleEntry) -> None:
    for figure in ("norm", "null_similarity"):
        if not getattr(entry, figure) > 0.0:
            raise ProjectorCacheError(
                f"{figure} of {entry.name} is {getattr(entry, figure)!r} in the projector cache, where only "
                "positive values can be; build the cache again"
            )
