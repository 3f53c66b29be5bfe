"""Where a policy's projectors are within a budget of memory: pure arithmetic, for the gate and for ``plan``.

R and L, which every module needs, are on the gate's device, and so is the memory for the work of an adapter.
What is left of the budget takes Ĉ or V of whole modules. The others are in pinned host memory as far as its
own budget goes, and on disk. They pass through two buffers on the device: one is used while the other is
filled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from safelora_vllm.errors import UsageError

_BUFFERS = 2


def pinned_bytes(nbytes: int) -> int:
    """What torch takes of host memory for a pinned tensor: the next power of two."""
    return 1 << (nbytes - 1).bit_length() if nbytes else 0


@dataclass(frozen=True)
class Demand:
    """Bytes that a policy takes of the gate's device, were there enough.

    bases: R and L of all modules. operators: module → Ĉ or V, where the policy reads it. working: the work of
    the largest adapter, while it is judged. shares: those of energy, on a CPU.
    """

    bases: int
    operators: Mapping[str, int]
    working: int
    shares: int = 0

    @cached_property
    def passing(self) -> int:
        """Both buffers for Ĉ and V that are not on the device."""
        return _BUFFERS * max(self.operators.values(), default=0)

    @property
    def fixed(self) -> int:
        """What is on the device in any case."""
        return self.bases + self.shares + self.working

    @property
    def whole(self) -> int:
        """Of everything on the device."""
        return self.fixed + sum(self.operators.values())

    @property
    def least(self) -> int:
        """The smallest budget that can be served."""
        return min(self.whole, self.fixed + self.passing)


@dataclass(frozen=True)
class Placement:
    """Where the projectors of a policy are, in bytes, and modules by the place of their Ĉ or V.

    Attributes:
        budget: of the gate's device, for projectors and work.
        device_bytes: what projectors take of it.
        host_bytes: what they take of pinned host memory.
        disk_bytes: what is read at each use.
        transient: what the work of an adapter takes of the device, its buffers included.
        passing: of that, the buffers for Ĉ and V that are not on the device.
        on_device: modules whose Ĉ or V is on the device.
        on_host: modules whose Ĉ or V is in host memory.
    """

    budget: int
    device_bytes: int
    host_bytes: int
    disk_bytes: int
    transient: int
    passing: int
    on_device: frozenset[str]
    on_host: frozenset[str]


def place(demand: Demand, budget: int | None = None, host: int = 0) -> Placement:
    """The placement within a budget; None: what the policy takes in all.

    Small operators come first, on the device as in host memory: those of attention are small, and most
    adapters change them. host: most bytes of pinned host memory.

    Raises:
        UsageError: the budget is too small, with the one that is needed.
    """
    budget = demand.whole if budget is None else budget
    if budget < demand.least:
        raise UsageError(_too_small(demand, budget))
    sizes, passing = demand.operators, 0
    if budget < demand.whole:
        passing = demand.passing
    order = sorted(sizes, key=sizes.__getitem__)
    on_device = _fitting(order, sizes, budget - demand.fixed - passing)
    pinned = {name: pinned_bytes(size) for name, size in sizes.items()}
    on_host = _fitting((name for name in order if name not in on_device), pinned, host)
    held = sum(sizes[name] for name in on_device)
    hosted = sum(sizes[name] for name in on_host)
    return Placement(
        budget=budget,
        device_bytes=demand.bases + demand.shares + held,
        host_bytes=hosted,
        disk_bytes=sum(sizes.values()) - held - hosted,
        transient=demand.working + passing,
        passing=passing,
        on_device=on_device,
        on_host=on_host,
    )


def _fitting(order: Iterable[str], sizes: Mapping[str, int], room: int) -> frozenset[str]:
    """The first ones that fit together, of names in the order of their sizes."""
    chosen = []
    for name in order:
        room -= sizes[name]
        if room < 0:
            break
        chosen.append(name)
    return frozenset(chosen)


def _too_small(demand: Demand, budget: int) -> str:
    takes = [f"{demand.bases + demand.shares:,} for R, L and the shares of energy of all modules"]
    ways = ["a smaller `energy`"] if demand.bases else []
    if demand.operators:
        takes.append(f"{demand.least - demand.fixed:,} for Ĉ or V of the largest modules")
        ways.append("a policy or a cache without Ĉ and V")
    takes.append(f"{demand.working:,} for the work of an adapter")
    ways.append("adapters of a smaller largest rank, where that can be set")
    return (
        f"`projector_memory` is {budget:,} bytes: expected {demand.least:,} or more ({'; '.join(takes)}). "
        f"Less is needed with {' or '.join(ways)}; or use another device"
    )
