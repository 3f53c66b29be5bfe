"""Safe LoRA: project the output side onto the subspace that alignment moved the weights along.

Source: Hsu et al., "Safe LoRA", NeurIPS 2024 (arXiv 2405.16833), section 3: ΔW' = Ĉ B A with
Ĉ = V Vᵀ/‖V‖_F. Ĉ is not an orthogonal projector: it also shrinks B, in practice strongly.

Of a random adapter the similarity is near c₀ = tr(Ĉ)/(‖Ĉ‖_F √d_out), so that τ ≥ c₀ has the module
projected, and Ĉ keeps ‖Ĉ‖_F²/d_out of ‖BA‖_F².
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_vllm.methods.method import Calibrator, Effect, Method, Spread

if TYPE_CHECKING:
    from torch import Tensor

    from safelora_vllm.methods.delta import Delta
    from safelora_vllm.policy import Policy
    from safelora_vllm.projectors.cache import Projector
    from safelora_vllm.projectors.manifest import ModuleEntry

_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_NUMBERS = (0.1, 0.25, 0.5, 0.75, 1.0)  # of all modules


def project(delta: Delta, _policy: Policy) -> tuple[Tensor, Tensor]:
    """New (A, B): A (r, d_in) as it was, B' = Ĉ B (d_out, r). Safe LoRA has no strength to set."""
    return delta.a, delta.image


@dataclass(frozen=True)
class SafeLoraEffect(Effect):
    """null_similarity: c₀. norm_kept: ‖ĈB‖_F/‖B‖_F, of every module as if it were projected."""

    fixed = ("null_similarity", "norm_kept")
    null_similarity: Spread
    norm_kept: Spread


def norm_kept(entry: ModuleEntry) -> float:
    """‖Ĉ‖_F/√d_out, which is ‖ĈB‖_F/‖B‖_F of a random B (d_out, r).

    From c₀ and tr(Ĉ) = ‖V‖_F: ‖Ĉ‖_F = ‖V‖_F/(c₀ √d_out).
    """
    return entry.norm / (entry.null_similarity * entry.shape[0])


def _effect(projectors: Sequence[Projector], projected: Collection[str], _policy: Policy) -> SafeLoraEffect:
    kept = [norm_kept(p.entry) for p in projectors]
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
