"""Bytes of the parts of a projector cache: in all, and of those that a policy reads.

They come from shapes and numbers of directions, those of a cache or assumed ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import torch
from tqdm import tqdm

from safelora_vllm.projectors.cache import ProjectorCache, check_not_empty, columns_held
from safelora_vllm.projectors.manifest import OPERATORS
from safelora_vllm.projectors.projector import Parts

_BASIS = torch.float32.itemsize


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of the parts of a cache.

    Attributes:
        operator: Ĉ or V.
        input_basis: R.
        output_basis: L.
        energy: the shares of energy, which the gate keeps in host memory.
    """

    operator: int = 0
    input_basis: int = 0
    output_basis: int = 0
    energy: int = 0

    @property
    def total(self) -> int:
        """Of all parts."""
        return self.operator + self.input_basis + self.output_basis + self.energy

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(*map(sum, zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class ModuleGroup:
    """Modules of one shape.

    Attributes:
        names: of the modules.
        shape: (d_out, d_in).
        form: ``dense`` (Ĉ is stored), ``factored`` (V is) or ``thin`` (neither is).
        kept: directions of R and L that the cache has of each module.
        input_directions: those of R that the policy reads.
        output_directions: those of L.
        disk: what the modules take in the cache.
        held: what the gate holds of them.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    form: str
    kept: tuple[int, ...]
    input_directions: tuple[int, ...]
    output_directions: tuple[int, ...]
    disk: CacheBytes
    held: CacheBytes

    @property
    def kinds(self) -> list[str]:
        """The last parts of the names, such as ``q_proj``."""
        return list(dict.fromkeys(name.rpartition(".")[2] for name in self.names))


def groups_of_cache(cache: ProjectorCache, parts: Parts) -> list[ModuleGroup]:
    """What a cache has and what is read of it. Its shards are verified as their energies are read.

    Raises:
        PolicyError: the policy has more energy than the cache.
        ProjectorCacheError: the cache has no modules, or is damaged.
    """
    check_not_empty(cache)
    operators = {name: cache.projector(name) for name in cache.modules}
    for operator in tqdm(operators.values(), desc="Energies", unit="module", delay=1.0):
        _ = operator.energies
    sizes, groups = cache.tensor_bytes(), []
    for names in cache.in_groups(cache.modules):
        entry = cache.modules[names[0]]
        key = OPERATORS.get(entry.form)
        group = module_group(
            names,
            entry.shape,
            entry.form,
            [len(operators[name].energies) for name in names],
            [operators[name].directions(parts.input_energy) for name in names],
            [operators[name].directions(parts.output_energy) for name in names],
            sum(sizes[f"{name}.{key}"] for name in names) if key else 0,
            parts.operator,
            sum(sizes[f"{name}.energy"] for name in names),
        )
        groups.append(group)
    return groups


def total(sizes: Iterable[CacheBytes]) -> CacheBytes:
    """Of several groups."""
    return sum(sizes, CacheBytes())


def module_group(
    names: Sequence[str], shape: tuple[int, int], form: str, kept: Sequence[int], inputs: Sequence[int],
    outputs: Sequence[int], operator: int, reads_operator: bool, shares: int,
) -> ModuleGroup:  # fmt: skip
    """Modules of one shape, with so many directions of each. operator: bytes of all their Ĉ or V; shares:
    of all their shares of energy.
    """
    (rows, columns), count = shape, sum(kept)
    disk = CacheBytes(operator, _BASIS * columns * count, _BASIS * rows * count, shares)
    held = CacheBytes(
        operator if reads_operator else 0,
        _BASIS * columns * sum(columns_held(inputs, kept)),
        _BASIS * rows * sum(columns_held(outputs, kept)),
        disk.energy,
    )
    return ModuleGroup(tuple(names), shape, form, tuple(kept), tuple(inputs), tuple(outputs), disk, held)
