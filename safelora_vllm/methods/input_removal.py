"""Input removal: the adapter may read any input except those that alignment learned to read.

A' = A − (A R) Rᵀ, where R (d_in, k) holds V's dominant right singular vectors up to a share
``energy`` of ‖V‖_F². The output side stays whole. An author who trains around R is not stopped, nor is one
who makes the adapter larger: what is left is not made smaller.

Of a random adapter the removal of k directions keeps 1 − k/d_in of ‖BA‖_F², in expectation.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_vllm.errors import UsageError
from safelora_vllm.methods.method import Calibrator, Effect, Method, Option, Search, Spread
from safelora_vllm.projectors.manifest import ENERGY_ROUNDING

if TYPE_CHECKING:
    from torch import Tensor

    from safelora_vllm.methods.delta import Delta
    from safelora_vllm.policy import Policy
    from safelora_vllm.projectors.cache import Projector

_STEPS = 100  # energies are searched in hundredths
_ENERGIES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def project(delta: Delta, policy: Policy) -> tuple[Tensor, Tensor]:
    """New A (r, d_in) and B (d_out, r).

    The product gets other ranks before it is rounded: with the author's, two large ones that nearly cancel
    could be made to round so that what was removed comes back. Those with orthogonal columns of B cannot
    cancel. So only single roundings bring it back: in bfloat16 up to 2⁻⁸ of what is left, where an author
    chose the values for it.
    """
    from safelora_vllm.methods import lowrank

    a, b = lowrank.orthonormal(delta.a - delta.read_inputs(policy.energy), delta.wide_b, delta.b_gram)
    return delta.rounded(a), delta.rounded(b)


@dataclass(frozen=True)
class InputRemovalEffect(Effect):
    """taken: k/d_in. energy: the share of the modules' ‖V‖_F² in those k directions.

    least_kept: the share of ‖BA‖_F² that is left in the module that loses most.
    """

    least_kept: float
    taken: Spread
    energy: float


def largest_energy(projectors: Sequence[Projector]) -> float:
    """The largest hundredth that the cache can serve as the energy in every module."""
    least = min(float(projector.energies[-1]) for projector in projectors)
    return min(math.floor((least + ENERGY_ROUNDING) * _STEPS), _STEPS) / _STEPS


def energy_that_keeps(share: float, projectors: Sequence[Projector]) -> float:
    """The largest energy, in hundredths, that leaves each module ``share`` of a random adapter's ‖BA‖_F².

    Raises:
        UsageError: the share is not one, or even the smallest energy leaves some module less.
    """
    if not 0.0 <= share <= 1.0:
        raise UsageError(f"`keep_random` is {share!r}: expected a share from 0 to 1, such as 0.9")
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
        f"{left:.4f}. Give `keep_random` {math.floor(left * 1e4) / 1e4:g} or less"
    )


def _effect_left(projector: Projector, energy: float) -> float:
    return 1.0 - projector.directions(energy) / projector.entry.shape[1]


def _effect(
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
        taken=Spread.of(taken),
        energy=sum(energies) / sum(p.entry.norm**2 for p in projectors),
    )


def _ladder(projectors: Sequence[Projector], policy: Policy) -> tuple[str, list[Policy]]:
    largest = largest_energy(projectors)
    rungs = [*(energy for energy in _ENERGIES if energy < largest), largest]
    return "energy", [dataclasses.replace(policy, energy=energy) for energy in rungs]


METHOD = Method(
    name="input-removal",
    project=project,
    options={"energy": Option("the share of the alignment's energy to remove", more_is_stricter=True)},
    energy=0.2,
    calibrator=Calibrator(_effect, _ladder, Search("energy", energy_that_keeps, largest_energy)),
)
