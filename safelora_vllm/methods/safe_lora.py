"""Safe LoRA: project the output side onto the subspace that alignment moved the weights along.

Source: Hsu et al., "Safe LoRA", NeurIPS 2024 (arXiv 2405.16833), section 3: ΔW' = Ĉ B A with
Ĉ = V Vᵀ/‖V‖_F. Ĉ is not an orthogonal projector: it also shrinks B, in practice strongly.

A thin projector cache has L (d_out, k) instead of Ĉ: orthonormal columns near V's first k left singular
vectors. Then B' = C_k B with C_k = L diag(σ_i²/‖V‖_F) Lᵀ.

- `projectors.dominant` derives f with ‖Ĉ − Ĉ₀‖₂ ≤ f ‖V‖_F. Ĉ₀ is block diagonal in [L, L_⊥], and C_k is its
  first block. So C_k = P Ĉ₀ = Ĉ₀ P with the orthogonal projector P = L Lᵀ.
- An orthogonal projector enlarges nothing: ‖C_k B A‖_F ≤ ‖Ĉ₀ B A‖_F. So

      ‖C_k B A‖_F ≤ ‖Ĉ B A‖_F + f ‖V‖_F ‖B A‖_F
      ‖C_k B A x‖ ≤ ‖Ĉ B A x‖ + f ‖V‖_F ‖B A x‖ for every input x

- With t ‖V‖_F a bound on Ĉ₀'s second block (`Spectrum.following`), C_k takes away more than Ĉ does by
  ‖(Ĉ − C_k) B A‖_F ≤ t ‖V‖_F ‖(1 − P) B A‖_F + f ‖V‖_F ‖B A‖_F.
- f (`Spectrum.residual`) is 0 where L has exact singular vectors. Then what is served is P (Ĉ B A): the part
  of what Ĉ would serve that lies in the first k output directions.

L is stored in float32, and products with it are of float32: both together count as an error of a few
2⁻²⁴ ‖Ĉ‖₂ ‖B‖_F ‖A‖_F.

Which modules are projected is decided by intervals then, and no module is left alone that Ĉ would not leave
alone: see `methods.selection`.

Of a random adapter the similarity is near c₀ = tr(Ĉ)/(‖Ĉ‖_F √d_out), so that τ ≥ c₀ has the module
projected, and Ĉ keeps ‖Ĉ‖_F²/d_out of ‖BA‖_F²; with a thin cache C_k does, of ‖C_k‖_F².
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_vllm.methods.method import Calibrator, Effect, Method, Spread
from safelora_vllm.projectors.manifest import WHOLE

if TYPE_CHECKING:
    from torch import Tensor

    from safelora_vllm.methods.delta import Delta
    from safelora_vllm.policy import Policy
    from safelora_vllm.projectors.cache import Projector
    from safelora_vllm.projectors.manifest import ModuleEntry

_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_NUMBERS = (0.1, 0.25, 0.5, 0.75, 1.0)  # of all modules


def project(delta: Delta, _policy: Policy) -> tuple[Tensor, Tensor]:
    """New (A, B): A (r, d_in) as it was, B' = Ĉ B (d_out, r), or C_k B. Safe LoRA has no strength to set."""
    return delta.a, delta.image


@dataclass(frozen=True)
class SafeLoraEffect(Effect):
    """null_similarity: c₀. norm_kept: ‖B'‖_F/‖B‖_F, of every module as if it were projected."""

    fixed = ("null_similarity", "norm_kept")
    null_similarity: Spread
    norm_kept: Spread


def operator_norm(entry: ModuleEntry) -> float:
    """‖Ĉ‖_F, from c₀ and tr(Ĉ) = ‖V‖_F."""
    return entry.norm / (entry.null_similarity * math.sqrt(entry.shape[0]))


def truncated_norm(projector: Projector) -> float:
    """‖C_k‖_F of all directions that the cache has."""
    return projector.entry.norm * projector.spectrum(WHOLE).norm


def norm_kept(projector: Projector) -> float:
    """‖ĈB‖_F/‖B‖_F of a random B (d_out, r), or ‖C_kB‖_F/‖B‖_F: that of the operator over √d_out."""
    norm = operator_norm(projector.entry) if projector.exact else truncated_norm(projector)
    return norm / math.sqrt(projector.entry.shape[0])


def _effect(projectors: Sequence[Projector], projected: Collection[str], _policy: Policy) -> SafeLoraEffect:
    kept = [norm_kept(p) for p in projectors]
    left = [x**2 if p.entry.name in projected else 1.0 for x, p in zip(kept, projectors, strict=True)]
    return SafeLoraEffect(
        modules=len(projectors),
        projected=sum(p.entry.name in projected for p in projectors),
        effect_kept=statistics.fmean(left),
        null_similarity=Spread.of(p.entry.null_similarity for p in projectors),
        norm_kept=Spread.of(kept),
    )


def _ladder(projectors: Sequence[Projector], policy: Policy) -> tuple[str, list[Policy]]:
    """Of how many modules are projected: by number if the policy counts them, else by threshold."""
    if policy.select == "number":
        numbers = sorted({math.ceil(share * len(projectors)) for share in _NUMBERS})
        return "number", [dataclasses.replace(policy, number=number) for number in numbers]
    by_threshold = dataclasses.replace(policy, select="threshold")
    return "threshold", [dataclasses.replace(by_threshold, threshold=value) for value in _THRESHOLDS]


METHOD = Method(
    name="safe-lora",
    project=project,
    select="threshold",  # as in the paper
    reads_operator=True,
    calibrator=Calibrator(_effect, _ladder),
)
