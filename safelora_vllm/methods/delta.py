"""One module's adapter weights next to its projector, and the figures that decide about it."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from safelora_vllm import lowrank
from safelora_vllm.projectors.cache import Projector


class ModuleDelta:
    """ΔW = B A of one module, with the scale s already folded into B.

    a: (r, d_in). b: (d_out, r). Both on the projector's device. Figures are computed once, when
    first asked for, in float64 from the factors.
    """

    def __init__(self, a: Tensor, b: Tensor, projector: Projector) -> None:
        self.a, self.b, self.projector = a, b, projector

    @cached_property
    def image(self) -> Tensor:
        """Ĉ B (d_out, r), float32; the product itself is in the projector's dtype."""
        b, scale = lowrank.unit(self.b)
        return self.projector.apply(b).to(torch.float32) * scale

    @cached_property
    def gram(self) -> Tensor:
        """A Aᵀ (r, r), float64."""
        return lowrank.gram(self.a)

    @cached_property
    def _products(self) -> tuple[float, float, float]:
        return lowrank.products(self.image, self.b, self.gram)

    @property
    def norm(self) -> float:
        """‖BA‖_F."""
        return math.sqrt(self._products[2])

    @property
    def similarity(self) -> float | None:
        """cos(ĈBA, BA) in the Frobenius inner product (paper, section 3.3); None for a zero delta."""
        return lowrank.cosine(*self._products)

    @property
    def relative_norm(self) -> float:
        """‖s·BA‖_F / ‖W_aligned‖_F."""
        return self.norm / self.projector.entry.aligned_norm

    def retained(self, a: Tensor, b: Tensor) -> float | None:
        """‖B'A'‖_F / ‖BA‖_F for new weights; None for a zero delta."""
        if self.norm == 0.0:
            return None
        if a is self.a and b is self.b:
            return 1.0
        if a is self.a and b is self.image:
            return math.sqrt(self._products[0]) / self.norm
        return lowrank.norm(b, self.gram if a is self.a else lowrank.gram(a)) / self.norm
