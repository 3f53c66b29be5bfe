"""Safe LoRA: project the output side onto the subspace that alignment moved the weights along.

Source: Hsu et al., "Safe LoRA", NeurIPS 2024 (arXiv 2405.16833), section 3: ΔW' = Ĉ B A with
Ĉ = V Vᵀ/‖V‖_F. Ĉ is not an orthogonal projector: it also shrinks B, in practice strongly.
"""

from __future__ import annotations

from torch import Tensor

from safelora_vllm.methods.delta import ModuleDelta
from safelora_vllm.policy import Policy


def project(delta: ModuleDelta, _policy: Policy) -> tuple[Tensor, Tensor]:
    """New (A, B): A (r, d_in) as it was, B' = Ĉ B (d_out, r). Safe LoRA has no strength to set."""
    return delta.a, delta.image
