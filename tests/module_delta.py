"""One module's delta, to compare its figures with the dense ones."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from safelora_vllm.methods.delta import Delta, InputStats, OutputStats
from safelora_vllm.projectors.projector import Parts, Projector, Spectrum


class ModuleDelta(Delta):
    """The delta of one module, with its figures on the host: what `judge` reads of many at once."""

    def __init__(
        self, a: Tensor, b: Tensor, projector: Projector, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(a, b, projector, dtype)
        self.entry = projector.entry

    @cached_property
    def _exact(self) -> InputStats:
        return self.stats(Parts())

    @cached_property
    def _own(self) -> InputStats:
        return InputStats.of(self.own_sums().tolist(), (0.0, 0.0), None)

    def stats(self, parts: Parts) -> InputStats:
        """All figures, the similarity from what a policy reads of the cache."""
        own, energy = self.own_sums().tolist(), parts.output_energy
        if parts.operator:
            return InputStats.of(own, self.exact_sums().tolist(), None)
        spectrum = self.projector.spectrum(energy)
        assert isinstance(spectrum, Spectrum)
        return InputStats.of(own, self.certified_sums(energy).tolist(), spectrum)

    @property
    def norm(self) -> float:
        """‖BA‖_F."""
        return self._own.norm

    @property
    def coherence(self) -> float:
        """See `lowrank.coherence`, of B and A."""
        return self._own.coherence

    @property
    def similarity(self) -> float | None:
        """cos(ĈBA, BA) by Ĉ or V; see `InputStats`.

        A thin cache has neither: there `stats` of other `Parts` gives the certified interval.
        """
        exact = self._exact.similarity
        return exact.middle if exact else None

    @property
    def relative_norm(self) -> float:
        """‖s·BA‖_F / ‖W_aligned‖_F."""
        return self.norm / self.entry.aligned_norm

    def served(self, a: Tensor, b: Tensor) -> OutputStats:
        """Figures of new weights, already `rounded`."""
        if a is self.a and b is self.b:
            return self._own.unchanged
        return self._own.served(*self.served_sums(a, b).tolist())
