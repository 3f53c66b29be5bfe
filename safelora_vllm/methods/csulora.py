"""CSULoRA: keep what stays within alignment's dominant directions on both sides, damp the rest.

Source: arXiv 2605.30640.
L (d_out, k) and R (d_in, k) hold V's dominant singular vectors up to a share ``energy`` of ‖V‖_F². With
P_L = L Lᵀ and P_R = R Rᵀ the adapter ΔW = B A is the sum of four orthogonal blocks,

    ΔW_LR = P_L ΔW P_R,  ΔW_L⊥ = P_L ΔW (1 − P_R),  ΔW_⊥R = (1 − P_L) ΔW P_R,  ΔW_⊥⊥ = (1 − P_L) ΔW (1 − P_R)

The first stays. Each other one is multiplied by γ = 1/(1 + λ) with λ = E/(E_LR + α ΣE), E being squared
Frobenius norms and ΣE that of all four. The sum has rank 2r at most; its best approximation of rank r is
served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_vllm.methods.method import Method, Option

if TYPE_CHECKING:
    from torch import Tensor

    from safelora_vllm.methods.delta import Delta
    from safelora_vllm.policy import Policy

_ALPHA = 0.05


def project(delta: Delta, policy: Policy) -> tuple[Tensor, Tensor]:
    """New A (r, d_in) and B (d_out, r); fewer ranks where a side of the module is smaller than r."""
    import torch

    from safelora_vllm.methods import lowrank

    a_in, b_in = delta.read_inputs(policy.energy), delta.written_outputs(policy.energy)
    a_out, b_out = delta.a - a_in, delta.b - b_in
    within, _, between = lowrank.product_sums(b_in, b_out, lowrank.gram(a_in)).unbind(-1)
    beyond_in, _, beyond = lowrank.product_sums(b_in, b_out, lowrank.gram(a_out)).unbind(-1)
    free = within + _ALPHA * (within + between + beyond_in + beyond)

    def gamma(energy: Tensor) -> Tensor:
        return torch.where(free != 0.0, free / (free + energy), 0.0)[..., None, None]

    a_for_b_in = a_in + gamma(beyond_in) * a_out
    a_for_b_out = gamma(between) * a_in + gamma(beyond) * a_out
    a, b = lowrank.reduced(
        torch.cat([a_for_b_in, a_for_b_out], dim=-2),
        torch.cat([b_in, b_out], dim=-1),
        rank=delta.a.shape[-2],
    )
    return delta.rounded(a), delta.rounded(b)


METHOD = Method(
    name="csulora",
    project=project,
    # With more energy more is kept, but what is not is damped more: not comparable.
    options={"energy": Option("the share of the alignment's energy to keep")},
    energy=0.95,  # as in the paper
    reads_output_bases=True,
    work=21,
)
