"""The operators of several modules of one shape, which are applied together.

Every tensor has a leading dimension of modules. Of a basis each module takes its own first k columns: the
group's basis has as many as the largest k, and ``taken`` says which of them are a module's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelora_vllm.projectors.manifest import WHOLE
from safelora_vllm.projectors.projector import Projector, Spectrum, within

if TYPE_CHECKING:
    from safelora_vllm.projectors.cache import ProjectorCache


class BasisStack:
    """The first columns of one basis of n modules of one shape, in one tensor (n, d, k)."""

    def __init__(self, names: Sequence[str], tensor: Tensor) -> None:
        self.tensor = tensor
        self._index = {name: place for place, name in enumerate(names)}

    def rows(self, names: Sequence[str], columns: int) -> Tensor | None:
        """Those of some modules (m, d, columns), a view where they are neighbours; None if one is missing."""
        places = [self._index.get(name, -1) for name in names]
        if -1 in places or self.tensor.shape[2] < columns:
            return None
        starts = [i for i, place in enumerate(places) if i == 0 or place != places[i - 1] + 1]
        runs = [
            self.tensor[places[start] : places[start] + end - start, :, :columns]
            for start, end in zip(starts, [*starts[1:], len(places)], strict=True)
        ]
        return runs[0] if len(runs) == 1 else torch.cat(runs)


@dataclass(frozen=True)
class GroupSpectrum:
    """What the modules of a group have in their bases up to an energy.

    modules: the spectrum of each. taken: (m, 1, k) float32, 1 in the columns of each module, 0 beyond.
    weights: (m, 3, k), those of `Spectrum`, 0 beyond.
    """

    modules: tuple[Spectrum, ...]
    taken: Tensor
    weights: Tensor

    @classmethod
    def of(cls, modules: Sequence[Spectrum], device: torch.device) -> GroupSpectrum:
        """Of these modules."""
        counts = torch.tensor([len(module.sizes) for module in modules])
        columns = int(counts.max())
        taken = (torch.arange(columns) < counts[:, None]).to(torch.float32)
        pad = torch.nn.functional.pad
        weights = torch.stack([pad(m.weights, (0, columns - len(m.sizes))) for m in modules])
        return cls(tuple(modules), taken[:, None, :].to(device), weights.to(device))


class ProjectorGroup:
    """As `Projector`, of several modules of one shape."""

    def __init__(self, projectors: Sequence[Projector], cache: ProjectorCache, device: torch.device) -> None:
        self.projectors = tuple(projectors)
        self._names = tuple(projector.entry.name for projector in projectors)
        self._cache, self._device = cache, device

    @property
    def exact(self) -> bool:
        """See `Projector.exact`; modules of one group are alike."""
        return self.projectors[0].exact

    def apply(self, b: Tensor) -> Tensor:
        """``Ĉ B`` of each module, for B (m, d_out, r), or ``C_k B``: see `Projector.apply`.

        Ĉ and V are too large to be copied into one tensor.
        """
        if not self.exact:
            norms = b.new_tensor([projector.entry.norm for projector in self.projectors])
            sizes = self.spectrum(WHOLE).weights[:, 0] * norms[:, None]
            return within(self.output_basis(WHOLE), sizes, b)
        return torch.stack([projector.apply(b[i]) for i, projector in enumerate(self.projectors)])

    def spectrum(self, energy: float) -> GroupSpectrum:
        """Up to an energy; see `Projector.spectrum`."""
        return self._cache.group_spectrum(self._names, energy, self._device)

    def input_basis(self, energy: float) -> Tensor:
        """R (m, d_in, k) of each module; only the columns ``taken`` are its own."""
        return self._basis("input_basis", energy)

    def output_basis(self, energy: float) -> Tensor:
        """L (m, d_out, k), as `input_basis`."""
        return self._basis("output_basis", energy)

    def taken(self, energy: float) -> Tensor:
        """(m, 1, k): see `GroupSpectrum`."""
        return self.spectrum(energy).taken

    def _basis(self, part: str, energy: float) -> Tensor:
        counts = [len(spectrum.sizes) for spectrum in self.spectrum(energy).modules]
        return self._cache.bases(self._names, part, counts, self._device)
