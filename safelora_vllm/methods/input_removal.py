"""Input removal: the adapter may read any input except those that alignment learned to read.

A' = A − (A R) Rᵀ, where R (d_in, k) holds V's dominant right singular vectors up to a share
``energy`` of ‖V‖_F². The output side stays whole. An author who trains around R is not stopped, nor is one
who makes the adapter larger: what is left is not made smaller.
"""

from __future__ import annotations

from torch import Tensor

from safelora_vllm.methods import lowrank
from safelora_vllm.methods.delta import ModuleDelta
from safelora_vllm.policy import Policy


def project(delta: ModuleDelta, policy: Policy) -> tuple[Tensor, Tensor]:
    """New A (r, d_in) and B (d_out, r); fewer ranks where a side of the module is smaller than r.

    The product is factorised anew before it is rounded: with the author's ranks, two large ones that nearly
    cancel could be made to round so that what was removed comes back. So only single roundings bring it back:
    in bfloat16 up to 2⁻⁸ of what is left, where an author chose his values for it.
    """
    inputs = delta.projector.input_basis(policy.energy)
    left = delta.a - lowrank.component(delta.a.T, inputs).T
    a, b = lowrank.reduced(left, delta.b, rank=left.shape[0])
    return delta.rounded(a), delta.rounded(b)
