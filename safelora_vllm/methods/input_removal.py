"""Input removal: the adapter may read any input except those that alignment learned to read.

A' = A − (A R) Rᵀ, where R (d_in, k) holds V's dominant right singular vectors up to a share
``energy`` of ‖V‖_F². The output side stays whole. An author who trains around R is not stopped.
"""

from __future__ import annotations

from torch import Tensor

from safelora_vllm import lowrank
from safelora_vllm.methods.delta import ModuleDelta
from safelora_vllm.policy import Policy


def project(delta: ModuleDelta, policy: Policy) -> tuple[Tensor, Tensor]:
    """New (A, B): A' (r, d_in) without its component in R, B (d_out, r) as it was."""
    inputs = delta.projector.input_basis(policy.energy)
    return delta.rounded(delta.a - lowrank.component(delta.a.T, inputs).T), delta.b
