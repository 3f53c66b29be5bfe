"""What a policy does to a random adapter, from a projector cache alone.

The rows of a random A are isotropic in d_in dimensions and the columns of a random B in d_out. Then, per
module and in expectation,

- input removal of k directions keeps 1 − k/d_in of ‖BA‖_F²;
- Safe LoRA's similarity is near c₀ = tr(Ĉ)/(‖Ĉ‖_F √d_out), so that τ ≥ c₀ has the module projected, and
  Ĉ keeps ‖Ĉ‖_F²/d_out of ‖BA‖_F².

A trained adapter is not random: these figures say what a policy costs an adapter that knows nothing of V,
not what it does to a harmful one.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from safelora_vllm.errors import ProjectorCacheError, UsageError
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ENERGY_ROUNDING, Projector
from safelora_vllm.projectors.manifest import ModuleEntry

_STEPS = 100  # energies are searched in hundredths
_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_NUMBERS = (0.1, 0.25, 0.5, 0.75, 1.0)  # of all modules
_ENERGIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some figures."""

    min: float
    median: float
    max: float


@dataclass(frozen=True)
class Effect:
    """What a policy does to a random adapter in some modules, of which ``projected`` are projected.

    effect_kept: the share of ‖BA‖_F² that is left of it, mean over the modules.
    fixed: the figures that do not depend on the policy's strength.
    """

    fixed: ClassVar[tuple[str, ...]] = ()
    modules: int
    projected: int
    effect_kept: float


@dataclass(frozen=True)
class InputRemovalEffect(Effect):
    """taken: k/d_in. energy: the share of the modules' ‖V‖_F² in those k directions.

    least_kept: the share of ‖BA‖_F² that is left in the module that loses most.
    """

    least_kept: float
    taken: Spread
    energy: float


@dataclass(frozen=True)
class SafeLoraEffect(Effect):
    """null_similarity: c₀. norm_kept: ‖ĈB‖_F/‖B‖_F, of every module as if it were projected."""

    fixed = ("null_similarity", "norm_kept")
    null_similarity: Spread
    norm_kept: Spread


@dataclass(frozen=True)
class Method:
    """How a method is calibrated.

    effect: of some modules, the names of those that are projected, and the policy.
    ladder: the field of a policy that it raises, and policies of rising strength.
    """

    effect: Callable[[Sequence[Projector], Collection[str], Policy], Effect]
    ladder: Callable[[Sequence[Projector], Policy], tuple[str, list[Policy]]]


@dataclass(frozen=True)
class Calibration:
    """types: the last part of the modules' names → effect. whole: of all modules.

    strength: the policy's field that differs in the ladder, whose policies stand with their effect on all
    modules.
    """

    types: dict[str, Effect]
    whole: Effect
    strength: str
    ladder: list[tuple[Policy, Effect]]


def calibrate(projectors: Sequence[Projector], policy: Policy) -> Calibration:
    """The policy's effect by module type, and that of a ladder of strengths.

    Raises:
        UsageError: the method cannot be calibrated, or the cache does not keep the policy's energy.
        ProjectorCacheError: the cache is damaged.
    """
    method = method_named(policy.method)
    for projector in projectors:
        _check_figures(projector.entry)

    def effect(some: Sequence[Projector], rules: Policy) -> Effect:
        return method.effect(some, _selected(projectors, rules), rules)

    groups: dict[str, list[Projector]] = {}
    for projector in projectors:
        groups.setdefault(projector.entry.name.rpartition(".")[2], []).append(projector)
    strength, rungs = method.ladder(projectors, policy)
    return Calibration(
        types={name: effect(group, policy) for name, group in groups.items()},
        whole=effect(projectors, policy),
        strength=strength,
        ladder=[(rung, effect(projectors, rung)) for rung in rungs],
    )


def method_named(name: str) -> Method:
    """How the method of that name is calibrated.

    Raises:
        UsageError: nobody wrote down what it does to a random adapter.
    """
    if name not in METHODS:
        raise UsageError(
            f"method {name!r} cannot be calibrated from the projector cache; calibrate knows "
            f"{', '.join(METHODS)}. For others compare adapters of your own with 'safelora-vllm inspect'"
        )
    return METHODS[name]


def largest_energy(projectors: Sequence[Projector]) -> float:
    """The largest hundredth that the cache can serve as input removal's energy in every module."""
    least = min(float(projector.energies[-1]) for projector in projectors)
    return min(math.floor((least + ENERGY_ROUNDING) * _STEPS), _STEPS) / _STEPS


def energy_that_keeps(share: float, projectors: Sequence[Projector]) -> float:
    """The largest energy, in hundredths, at which input removal leaves each module ``share`` of ‖BA‖_F².

    Raises:
        UsageError: the share is none, or even the smallest energy leaves some module less.
    """
    if not 0.0 <= share <= 1.0:
        raise UsageError(f"keep_random is {share!r}; give a share from 0 to 1, e.g. 0.9")
    for hundredths in range(round(largest_energy(projectors) * _STEPS), 0, -1):
        energy = hundredths / _STEPS
        if all(_effect_left(projector, energy) >= share - 1e-12 for projector in projectors):
            return energy
    smallest = 1 / _STEPS
    worst = min(projectors, key=lambda projector: _effect_left(projector, smallest))
    left = _effect_left(worst, smallest)
    raise UsageError(
        f"no energy keeps {share:g} of a random adapter's effect in every module: even {smallest:g} takes "
        f"{worst.directions(smallest)} of {worst.entry.shape[1]} directions in {worst.entry.name} and leaves "
        f"{left:.4f}. Give --keep-random {math.floor(left * 1e4) / 1e4:g} or less"
    )


def norm_kept(entry: ModuleEntry) -> float:
    """‖Ĉ‖_F/√d_out, which is ‖ĈB‖_F/‖B‖_F of a random B (d_out, r).

    From c₀ and tr(Ĉ) = ‖V‖_F: ‖Ĉ‖_F = ‖V‖_F/(c₀ √d_out).
    """
    return entry.norm / (entry.null_similarity * entry.shape[0])


def _effect_left(projector: Projector, energy: float) -> float:
    return 1.0 - projector.directions(energy) / projector.entry.shape[1]


def _selected(projectors: Sequence[Projector], policy: Policy) -> set[str]:
    """The modules that a random adapter has projected: its similarities are the null values."""
    return policy.selects({p.entry.name: p.entry.null_similarity for p in projectors})


def _input_removal(
    projectors: Sequence[Projector], projected: Collection[str], policy: Policy
) -> InputRemovalEffect:
    counts = [p.directions(policy.energy) if p.entry.name in projected else 0 for p in projectors]
    taken = [k / p.entry.shape[1] for k, p in zip(counts, projectors, strict=True)]
    energies = [
        float(p.energies[k - 1]) * p.entry.norm**2 if k else 0.0
        for k, p in zip(counts, projectors, strict=True)
    ]
    return InputRemovalEffect(
        modules=len(projectors),
        projected=sum(p.entry.name in projected for p in projectors),
        effect_kept=statistics.fmean(1.0 - share for share in taken),
        least_kept=1.0 - max(taken),
        taken=_spread(taken),
        energy=sum(energies) / sum(p.entry.norm**2 for p in projectors),
    )


def _energies(projectors: Sequence[Projector], policy: Policy) -> tuple[str, list[Policy]]:
    largest = largest_energy(projectors)
    rungs = [*(energy for energy in _ENERGIES if energy < largest), largest]
    return "energy", [dataclasses.replace(policy, energy=energy) for energy in rungs]


def _safe_lora(
    projectors: Sequence[Projector], projected: Collection[str], _policy: Policy
) -> SafeLoraEffect:
    kept = [norm_kept(p.entry) for p in projectors]
    left = [x**2 if p.entry.name in projected else 1.0 for x, p in zip(kept, projectors, strict=True)]
    return SafeLoraEffect(
        modules=len(projectors),
        projected=sum(p.entry.name in projected for p in projectors),
        effect_kept=statistics.fmean(left),
        null_similarity=_spread(p.entry.null_similarity for p in projectors),
        norm_kept=_spread(kept),
    )


def _shares(projectors: Sequence[Projector], policy: Policy) -> tuple[str, list[Policy]]:
    """Of how many modules are projected: by number if the policy counts them, else by threshold."""
    if policy.select == "number":
        numbers = sorted({math.ceil(share * len(projectors)) for share in _NUMBERS})
        return "number", [dataclasses.replace(policy, number=number) for number in numbers]
    by_threshold = dataclasses.replace(policy, select="threshold")
    return "threshold", [dataclasses.replace(by_threshold, threshold=value) for value in _THRESHOLDS]


def _spread(figures: Iterable[float]) -> Spread:
    values = sorted(figures)
    return Spread(values[0], statistics.median(values), values[-1])


def _check_figures(entry: ModuleEntry) -> None:
    for figure in ("norm", "null_similarity"):
        if not getattr(entry, figure) > 0.0:
            raise ProjectorCacheError(
                f"{figure} of {entry.name} is {getattr(entry, figure)!r} in the projector cache, where only "
                "positive values can be; build the cache again"
            )


METHODS = {
    "safe-lora": Method(_safe_lora, _shares),
    "input-removal": Method(_input_removal, _energies),
}
