"""One module's adapter weights next to its projector, and the figures that decide about it."""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from safelora_vllm.methods import certified, lowrank
from safelora_vllm.methods.certified import Interval
from safelora_vllm.projectors.cache import Parts, Projector


class OutputStats(NamedTuple):
    """Figures of the weights that would be served.

    retained: ‖B'A'‖_F / ‖BA‖_F, None for a zero delta. coherence: of B' and A', see `lowrank.coherence`.
    """

    retained: float | None
    coherence: float


class ModuleDelta:
    """ΔW = B A of one module, with the scale s already folded into B.

    a: (r, d_in). b: (d_out, r), balanced against each other. Both on the projector's device. dtype: of the
    weights as they are served. Everything is rounded to it before it is measured: what is judged is
    served. Figures are computed once, when first asked for, in float64 from the factors.
    """

    def __init__(
        self, a: Tensor, b: Tensor, projector: Projector, dtype: torch.dtype = torch.float32
    ) -> None:
        self.projector, self.dtype = projector, dtype
        a, b = lowrank.balanced(a, b)
        self.a, self.b = self.rounded(a), self.rounded(b)

    def rounded(self, factor: Tensor) -> Tensor:
        """A factor as it is served, in float32."""
        return factor.to(self.dtype).to(torch.float32)

    @cached_property
    def image(self) -> Tensor:
        """Ĉ B (d_out, r), as it would be served; the product itself is in the projector's dtype."""
        b, scale = lowrank.unit(self.b)
        return self.rounded(self.projector.apply(b).to(torch.float32) * scale)

    @cached_property
    def gram(self) -> Tensor:
        """A Aᵀ (r, r), float64."""
        return lowrank.gram(self.a)

    @cached_property
    def _own(self) -> lowrank.Products:
        return lowrank.products(self.b, self.b, self.gram)

    @cached_property
    def _products(self) -> lowrank.Products:
        return lowrank.products(self.image, self.b, self.gram)

    @property
    def norm(self) -> float:
        """‖BA‖_F."""
        return math.sqrt(self._own.yy)

    @property
    def coherence(self) -> float:
        """See `lowrank.coherence`, of B and A."""
        return lowrank.coherence(self._own.yy, self._own.y_spread)

    @property
    def similarity(self) -> float | None:
        """cos(ĈBA, BA) in the Frobenius inner product (paper, section 3.3).

        None where every rank has a zero side, and only there: such a delta changes nothing.
        """
        if self._own.y_spread == 0.0:
            return None
        return lowrank.cosine(*self._products[:3])

    def similarity_by(self, parts: Parts) -> Interval | None:
        """The similarity from what a policy reads of the cache; None as for `similarity`.

        With Ĉ or V its error is 0; else the interval holds it, see `methods.certified`.
        """
        if self._own.y_spread == 0.0:
            return None
        if parts.operator:
            return Interval(lowrank.cosine(*self._products[:3]) or 0.0, 0.0)
        sizes, t = self.projector.spectrum(parts.output_energy)
        basis = self.projector.output_basis(parts.output_energy)
        known = certified.sums(self.b, self.gram, basis, sizes.to(basis.device)).tolist()
        return certified.interval(known, self._own.yy, self.coherence, sizes, t)

    @property
    def relative_norm(self) -> float:
        """‖s·BA‖_F / ‖W_aligned‖_F."""
        return self.norm / self.projector.entry.aligned_norm

    def served(self, a: Tensor, b: Tensor) -> OutputStats:
        """Figures of new weights, already `rounded`."""
        if a is self.a and b is self.b:
            return OutputStats(1.0 if self.norm else None, self.coherence)
        if a is self.a and b is self.image:
            squared, spread = self._products.xx, self._products.x_spread
        else:
            _, _, squared, _, spread = lowrank.products(b, b, lowrank.gram(a))
        retained = math.sqrt(squared) / self.norm if self.norm else None
        return OutputStats(retained, lowrank.coherence(squared, spread))
