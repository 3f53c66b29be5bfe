"""All modules of an adapter measured and projected, in groups of one shape and rank.

A group costs a fixed number of operators, and two points where the host waits for the device: its weights are
copied there together, and what is served comes back together with all figures. A policy that decides by
similarity waits for that too. The size of a group is bounded, and with it the memory that its work takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelora_vllm.methods import METHODS
from safelora_vllm.methods.delta import Delta, InputStats, OutputStats
from safelora_vllm.methods.reads import parts_read
from safelora_vllm.methods.selection import Interval, Selection
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.exact_products import exact_products
from safelora_vllm.projectors.manifest import ModuleEntry
from safelora_vllm.projectors.projector import Parts

if TYPE_CHECKING:
    from safelora_vllm.policy import Policy

Pair = tuple[Tensor, Tensor]
# Of a group's A and B in float32; its work takes `Method.work` times as much. On a CPU a group should fit
# into a core's cache; elsewhere fewer operators count for more, and the memory does.
_CPU_BYTES = 1 * 1024**2
_DEVICE_BYTES = 16 * 1024**2
# Copies of a group's bases, R in float32 and L in float64, may take this many times as much as its A and B.
_BASES = 4


@dataclass(frozen=True)
class JudgedModule:
    """One module's figures and weights.

    entry: of the projector cache. rank: columns of B. came: figures before the decision. served: after it.
    projected: the decision. uncertain: it is so only because the similarity is not known exactly. a, b: what
    is to be served, on the CPU.
    """

    entry: ModuleEntry
    rank: int
    came: InputStats
    served: OutputStats
    projected: bool
    uncertain: bool
    a: Tensor
    b: Tensor

    @property
    def similarity(self) -> Interval | None:
        """See `InputStats`."""
        return self.came.similarity

    @property
    def relative_norm(self) -> float:
        """‖s·BA‖_F / ‖W_aligned‖_F."""
        return self.came.norm / self.entry.aligned_norm


def judge(
    weights: Mapping[str, Pair],
    cache: ProjectorCache,
    policy: Policy,
    device: torch.device,
    dtype: torch.dtype,
) -> list[JudgedModule]:
    """Every module of an adapter, in the order of ``weights``.

    Args:
        weights: module → A (r, d_in) and B (d_out, r), float32, on the CPU.
        cache: with all of these modules.
        policy: which modules are projected, and how. In report-only mode the weights stay as they came.
        device: where to compute.
        dtype: of the weights as they are served.
    """
    parts = parts_read(policy, cache.thin)
    groups = grouped(weights, cache, _group_bytes(device), parts)
    chosen = Selection(frozenset()) if policy.selects_none else None
    judged: dict[str, JudgedModule] = {}
    measures = policy.select == "number" and chosen is None
    applied = [name for names in groups for name in names] * (1 + measures)
    with exact_products(), cache.ahead(applied if parts.operator else []):
        if measures:  # which are the least similar is known when all are measured
            similarities: dict[str, Interval | None] = {}
            for names in groups:
                group = _Group(names, weights, cache, policy, device, dtype)
                similarities |= _similarities(names, group.measured())
            chosen = policy.selects(similarities)
        for names in groups:
            for module in _Group(names, weights, cache, policy, device, dtype).judged(chosen):
                judged[module.entry.name] = module
    return [judged[name] for name in weights]


def warm_up(
    cache: ProjectorCache, policy: Policy, device: torch.device, dtype: torch.dtype, max_rank: int
) -> None:
    """Take now what judging takes of a device: its libraries, and the memory for the largest groups.

    Torch keeps that memory for the next adapters, so that what is free afterwards stays free. The arguments
    are those of `judge`; max_rank is of the largest adapter.
    """
    shapes = {n: entry.shape for n, entry in cache.modules.items()}
    apart = [name for names in cache.in_groups(shapes) for name in names[::2]]
    # The largest copies of bases are those of many modules of a small rank that are no neighbours.
    for rank, chosen in ((1, apart), (min(16, max_rank), [*shapes]), (max_rank, [*shapes])):
        # Zeros that take no memory.
        sides = {n: (torch.zeros(rank, 1), torch.zeros(1, rank)) for n in chosen}
        weights = {n: (a.expand(-1, shapes[n][1]), b.expand(shapes[n][0], -1)) for n, (a, b) in sides.items()}
        largest: dict[tuple[int, int], list[str]] = {}
        for names in grouped(weights, cache, _group_bytes(device), parts_read(policy, cache.thin)):
            largest.setdefault(shapes[names[0]], names)
        for names in largest.values():
            judge({name: weights[name] for name in names}, cache, policy, device, dtype)


def working_bytes(
    shapes: Mapping[tuple[int, int], int], rank: int, policy: Policy, device: torch.device,
    bases: Mapping[tuple[int, int], int],
) -> int:  # fmt: skip
    """What judging an adapter takes of a device for a while, about: the work of its largest group.

    Args:
        shapes: (d_out, d_in) → modules of it.
        rank: of the adapter.
        policy: as for `judge`.
        device: as for `judge`; it need not be there.
        bases: (d_out, d_in) → what copies of a module's bases take, see `ProjectorCache.basis_bytes`.
    """
    largest = 0
    for shape, count in shapes.items():
        pair = _pair_bytes(shape, rank)
        together = min(count, _group_size(pair, bases[shape], _group_bytes(device)))
        largest = max(largest, together * max(METHODS[policy.method].work * pair, bases[shape]))
    return largest


def _pair_bytes(shape: tuple[int, int], rank: int) -> int:
    """Of one module's A and B."""
    return rank * sum(shape) * torch.float32.itemsize


def _group_size(pair: int, bases: int, nbytes: int) -> int:
    """How many modules a group has, of what each one's weights and bases take and a group's weights may."""
    return max(1, min(nbytes // max(pair, 1), _BASES * nbytes // max(bases, 1)))


def _group_bytes(device: torch.device) -> int:
    return _CPU_BYTES if device.type == "cpu" else _DEVICE_BYTES


def grouped(
    weights: Mapping[str, Pair], cache: ProjectorCache, nbytes: int, parts: Parts | None = None
) -> list[list[str]]:
    """Modules of one shape and rank together, as many as have at most ``nbytes`` of A and B, at least one.

    parts: what the policy reads; copies of its bases bound a group too.
    """
    groups = []
    for names in cache.in_groups(weights):
        bases = cache.basis_bytes(names, parts) if parts else 0
        ranks: dict[int, list[str]] = {}
        for name in names:
            ranks.setdefault(weights[name][0].shape[0], []).append(name)
        for rank, alike in ranks.items():
            size = _group_size(_pair_bytes(cache.modules[alike[0]].shape, rank), bases, nbytes)
            groups += [alike[start : start + size] for start in range(0, len(alike), size)]
    return groups


class _Group:
    """One group on its way through a policy."""

    def __init__(
        self, names: Sequence[str], weights: Mapping[str, Pair], cache: ProjectorCache, policy: Policy,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self._policy, self._parts = policy, parts_read(policy, cache.thin)
        self._names, self._entries = names, [cache.modules[name] for name in names]
        self._projectors = cache.group(names, device)
        pairs = [weights[name] for name in names]
        sides = [side for part in zip(*pairs, strict=True) for side in part]
        flat = torch.cat([side.reshape(-1) for side in sides]).to(device)
        (rank, d_in), d_out, count = pairs[0][0].shape, pairs[0][1].shape[0], len(names)
        a, b = flat[: count * rank * d_in], flat[count * rank * d_in :]
        self._delta = Delta(a.view(count, rank, d_in), b.view(count, d_out, rank), self._projectors, dtype)

    def _sums(self) -> Tensor:
        energy = self._parts.output_energy
        known = self._delta.exact_sums() if self._parts.operator else self._delta.certified_sums(energy)
        return torch.cat([self._delta.own_sums(), known], dim=1)

    def _stats(self, sums: Sequence[Sequence[float]]) -> list[InputStats]:
        if self._parts.operator:
            return [InputStats.of(row[:2], row[2:], None) for row in sums]
        spectra = self._projectors.spectrum(self._parts.output_energy).modules
        return [InputStats.of(row[:2], row[2:], found) for row, found in zip(sums, spectra, strict=True)]

    def measured(self) -> list[InputStats]:
        """Figures of the modules as they came."""
        return self._stats(self._sums().tolist())

    def judged(self, chosen: Selection | None) -> Iterator[JudgedModule]:
        """The answer for each module; ``chosen``: which are projected, where that is known already."""
        delta, policy, sums = self._delta, self._policy, self._sums()
        if policy.select == "threshold":
            chosen = policy.selects(_similarities(self._names, self._stats(sums.tolist())))
        a, b, new_sums = delta.a, delta.b, sums[:, :2]
        if chosen is None or not chosen.projected.isdisjoint(self._names):
            new_a, new_b = METHODS[policy.method].project(delta, policy)
            new_sums = delta.served_sums(new_a, new_b)
            if policy.enforcing:
                a, b = new_a, new_b
        figures, a, b = on_host([torch.cat([sums, new_sums], dim=1), a, b])
        rows = figures.tolist()
        came = self._stats([row[:-2] for row in rows])
        if chosen is None:
            chosen = policy.selects(_similarities(self._names, came))
        for i, (name, entry) in enumerate(zip(self._names, self._entries, strict=True)):
            projected, uncertain = name in chosen.projected, name in chosen.uncertain
            served = came[i].served(*rows[i][-2:]) if projected else came[i].unchanged
            pair = a[i], b[i]
            if policy.enforcing and not projected:
                pair = delta.a[i].cpu(), delta.b[i].cpu()
            yield JudgedModule(entry, delta.b.shape[2], came[i], served, projected, uncertain, *pair)


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of one device on the CPU, in one copy; those of the largest elements come first."""
    if tensors[0].device.type == "cpu":
        return list(tensors)
    return unpacked(packed(tensors).cpu(), tensors)


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of all, one after another."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def unpacked(data: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `packed`, as views."""
    ends = list(itertools.accumulate(tensor.nbytes for tensor in like))
    return [
        data[end - tensor.nbytes : end].view(tensor.dtype).view(tensor.shape)
        for end, tensor in zip(ends, like, strict=True)
    ]


def _similarities(names: Sequence[str], stats: Sequence[InputStats]) -> dict[str, Interval | None]:
    return {name: found.similarity for name, found in zip(names, stats, strict=True)}
