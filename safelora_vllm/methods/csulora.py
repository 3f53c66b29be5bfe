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

    from safelora_vllm.methods.delta import ModuleDelta
    from safelora_vllm.policy import Policy

_ALPHA = 0.05


def project(delta: ModuleDelta, policy: Policy) -> tuple[Tensor, Tensor]:
    """New A (r, d_in) and B (d_out, r); fewer ranks where a side of the module is smaller than r."""
    import torch

    from safelora_vllm.methods import lowrank

    a_in = lowrank.component(delta.a.T, delta.projector.input_basis(policy.energy)).T
    b_in = lowrank.component(delta.b, delta.projector.output_basis(policy.energy))
    a_out, b_out = delta.a - a_in, delta.b - b_in
    within = lowrank.products(b_in, b_out, lowrank.gram(a_in))
    beyond = lowrank.products(b_in, b_out, lowrank.gram(a_out))
    free = within.xx + _ALPHA * (within.xx + within.yy + beyond.xx + beyond.yy)

    def gamma(energy: float) -> float:
        return free / (free + energy) if free else 0.0

    a_for_b_in = a_in + gamma(beyond.xx) * a_out
    a_for_b_out = gamma(within.yy) * a_in + gamma(beyond.yy) * a_out
    a, b = lowrank.reduced(
        torch.cat([a_for_b_in, a_for_b_out]), torch.cat([b_in, b_out], dim=1), rank=delta.a.shape[0]
    )
    return delta.rounded(a), delta.rounded(b)


METHOD = Method(
    name="csulora",
    project=project,
    # With more energy more is kept, but what is not is damped more: not comparable.
    options={"energy": Option("the share of the alignment's energy to keep")},
    energy=0.95,  # as in the paper
    reads_output_bases=True,
)
