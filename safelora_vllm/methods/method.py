"""What this package has to know of a projection method, for policies, the gate and ``calibrate``.

Nothing here imports torch: policies are read, and ``--help`` is printed, without waiting for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from safelora_vllm.methods.delta import Delta
    from safelora_vllm.policy import Policy
    from safelora_vllm.projectors.cache import Projector


@dataclass(frozen=True)
class Option:
    """A field of the policy that a method reads.

    help: what the field sets, for ``--help``.
    more_is_stricter: whether a larger value serves no adapter more freely, and 0 leaves every adapter as it
        is. Otherwise two different values cannot be compared.
    """

    help: str
    more_is_stricter: bool = False

    def at_least_as_strict(self, mine: float, theirs: float) -> bool:
        """Whether the first value serves no adapter more freely than the second."""
        return mine >= theirs if self.more_is_stricter else mine == theirs

    def tightened(self, mine: float, theirs: float) -> float:
        """The stricter of both values; the first where they cannot be compared."""
        return max(mine, theirs) if self.more_is_stricter else mine


@dataclass(frozen=True)
class Method:
    """A projection method.

    name: as in a policy.
    project: ``(delta, policy) -> (A', B')``, rounded, with the leading dimensions of the delta, and without
        waiting for the device.
    options: the policy's fields that it reads, besides those that select modules and the caps.
    select: which modules it projects where a policy does not say so.
    energy: the policy's energy where it does not say so.
    reads_operator: whether it reads Ĉ or V of the projector cache, which takes the most memory.
    reads_output_bases: whether it reads L, which takes memory too. Of the methods with an ``energy``, all
        read R.
    work: how many times the memory of a group's A and B its work takes, as benchmarks/gpu measured it.
    calibrator: what it does to a random adapter; without one it cannot be calibrated.
    """

    name: str
    project: Callable[[Delta, Policy], tuple[Tensor, Tensor]]
    options: Mapping[str, Option] = field(default_factory=dict)
    select: str = "all"
    energy: float = 0.2
    reads_operator: bool = False
    reads_output_bases: bool = False
    work: int = 8
    calibrator: Calibrator | None = None


@dataclass(frozen=True)
class Calibrator:
    """How a method is calibrated.

    effect: of some modules, the names of those that are projected, and the policy.
    ladder: the field of a policy that it raises, and policies of rising strength.
    search: finds a strength for ``--keep-random``, where the method has one.
    """

    effect: Callable[[Sequence[Projector], Collection[str], Policy], Effect]
    ladder: Callable[[Sequence[Projector], Policy], tuple[str, list[Policy]]]
    search: Search | None = None


@dataclass(frozen=True)
class Search:
    """How the strength is found that leaves a random adapter a share of its effect.

    field: of the policy, whose value is found.
    find: of the share and all modules; raises UsageError where no value leaves that much.
    largest: the largest value that the projector cache can serve.
    """

    field: str
    find: Callable[[float, Sequence[Projector]], float]
    largest: Callable[[Sequence[Projector]], float]


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some figures."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, figures: Iterable[float]) -> Spread:
        """The spread of at least one figure."""
        values = sorted(figures)
        return cls(values[0], statistics.median(values), values[-1])


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
