"""Adapter weights next to their projectors, and the figures that decide about them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from safelora_vllm.methods import certified, lowrank
from safelora_vllm.methods.selection import Interval
from safelora_vllm.projectors.group import ProjectorGroup
from safelora_vllm.projectors.projector import Projector, Spectrum


class OutputStats(NamedTuple):
    """Figures of the weights that would be served.

    retained: ‖B'A'‖_F / ‖BA‖_F, None for a zero delta. coherence: of B' and A', see `lowrank.coherence`.
    """

    retained: float | None
    coherence: float


@dataclass(frozen=True)
class InputStats:
    """Figures of one module's weights as they came.

    norm: ‖BA‖_F. coherence: see `lowrank.coherence`, of B and A. similarity: cos(ĈBA, BA) in the Frobenius
    inner product (paper, section 3.3), with the error of its interval; None where every rank has a zero side,
    and only there: such a delta changes nothing.
    """

    norm: float
    coherence: float
    similarity: Interval | None

    @classmethod
    def of(cls, own: Sequence[float], known: Sequence[float], spectrum: Spectrum | None) -> InputStats:
        """From the sums of `Delta`; with a spectrum the similarity is certified, else exact."""
        squared, spread = max(own[0], 0.0), own[1] * own[1]
        coherence = lowrank.coherence(squared, spread)
        if spread == 0.0:
            similarity = None
        elif spectrum is None:
            similarity = Interval(lowrank.cosine(max(known[0], 0.0), known[1], squared) or 0.0, 0.0)
        else:
            similarity = certified.interval(known, squared, coherence, spectrum)
        return cls(math.sqrt(squared) if squared < math.inf else squared, coherence, similarity)

    def served(self, squared: float, root: float) -> OutputStats:
        """Of new weights with these `lowrank.norm_sums`."""
        squared, spread = max(squared, 0.0), root * root
        return OutputStats(
            math.sqrt(squared) / self.norm if self.norm else None, lowrank.coherence(squared, spread)
        )

    @property
    def unchanged(self) -> OutputStats:
        """Of the weights as they came."""
        return OutputStats(1.0 if self.norm else None, self.coherence)


class Delta:
    """ΔW = B A with the scale s already folded into B, of one module or of several of one shape.

    a: (r, d_in). b: (d_out, r), balanced against each other. Both on the projector's device, and with a
    leading dimension of modules where it is a `ProjectorGroup`. dtype: of the weights as they are served.
    Everything is rounded to it before it is measured: what is judged is served. Figures are computed once,
    when first asked for, in float64 from the factors, and stay on the device.
    """

    def __init__(
        self, a: Tensor, b: Tensor, projector: Projector | ProjectorGroup, dtype: torch.dtype = torch.float32
    ) -> None:
        self.projector, self.dtype = projector, dtype
        a, b = lowrank.balanced(a, b)
        self.a, self.b = self.rounded(a), self.rounded(b)

    def rounded(self, factor: Tensor) -> Tensor:
        """A factor as it is served, in float32."""
        return factor.to(self.dtype).to(torch.float32)

    @cached_property
    def image(self) -> Tensor:
        """Ĉ B (d_out, r), or C_k B, as it would be served; see `Projector.apply`."""
        b, scale = lowrank.unit(self.b)
        return self.rounded(self.projector.apply(b).to(torch.float32) * scale)

    @cached_property
    def gram(self) -> Tensor:
        """A Aᵀ (r, r), float64."""
        return lowrank.gram(self.a)

    @cached_property
    def wide_b(self) -> Tensor:
        """B (d_out, r) in float64."""
        return self.b.to(torch.float64)

    @cached_property
    def b_gram(self) -> Tensor:
        """Bᵀ B (r, r), float64."""
        return lowrank.gram(self.wide_b.mT)

    def read_inputs(self, energy: float) -> Tensor:
        """A R Rᵀ (r, d_in), float64: what of A reads the directions of `Projector.input_basis`."""
        basis = self.projector.input_basis(energy)
        return lowrank.component(self.a.mT, basis, self.projector.taken(energy)).mT

    def written_outputs(self, energy: float) -> Tensor:
        """L Lᵀ B (d_out, r), float64, as `read_inputs`."""
        return lowrank.component(self.b, self.projector.output_basis(energy), self.projector.taken(energy))

    def own_sums(self) -> Tensor:
        """(2,): `lowrank.norm_sums` of B and A."""
        return lowrank.norm_sums(self.b_gram, self.gram)

    def exact_sums(self) -> Tensor:
        """(2,): ‖ĈBA‖² and ⟨ĈBA, BA⟩, where the cache has Ĉ or V."""
        assert self.projector.exact, "C_k is not Ĉ: its cosine is another one"
        return lowrank.product_sums(self.image, self.b, self.gram)[..., :2]

    def certified_sums(self, energy: float) -> Tensor:
        """(3,): `certified.sums` with L up to an energy."""
        weights = self.projector.spectrum(energy).weights.to(self.b.device)
        return certified.sums(self.wide_b, self.gram, self.projector.output_basis(energy), weights)

    def served_sums(self, a: Tensor, b: Tensor) -> Tensor:
        """(2,): `lowrank.norm_sums` of new weights, already `rounded`."""
        return lowrank.norm_sums(lowrank.gram(b.mT), self.gram if a is self.a else lowrank.gram(a))
