"""What an adapter's size has to keep to, and whether its figures mean anything."""

from __future__ import annotations

import math
from collections.abc import Mapping

from safelora_vllm.errors import Fault, Reason, by_cause, named
from safelora_vllm.methods.judge import JudgedModule
from safelora_vllm.policy import Policy

# ‖BA‖² over (Σ_k ‖b_k‖‖a_k‖)²: 1/r for unrelated ranks, more for trained ones. Rounding to bfloat16 moves a
# delta by about 2⁻⁹ of the root of the latter, if an author makes all errors add up: here 5 % of its norm.
_MIN_COHERENCE = 1.5e-3
_NOT_FINITE = "scaling (lora_alpha) or projecting gave values that are not finite; use a smaller lora_alpha"


def check_norms(relative_norms: Mapping[str, float], policy: Policy) -> list[Reason]:
    """The cap on single modules. The sentence names the largest first."""
    over = {module: norm for module, norm in relative_norms.items() if not norm <= policy.max_relative_norm}
    if not over:
        return []
    modules = sorted(over, key=over.__getitem__, reverse=True)
    upto = "up to " if len(over) > 1 else ""
    return [
        Reason(
            "relative_norm",
            f"{named(modules)}: the adapter is {upto}{over[modules[0]]:.8g} times the module's weight, "
            f"allowed are {policy.max_relative_norm:.8g} (`max_relative_norm`). A smaller lora_alpha makes "
            "it smaller",
        )
    ]


def check_total(total: float, policy: Policy) -> list[Reason]:
    """The cap on all modules together."""
    if total <= policy.max_total_norm:
        return []
    return [
        Reason(
            "total_norm",
            f"all modules together are {total:.8g} times the weights of all modules with a projector, "
            f"allowed are {policy.max_total_norm:.8g} (`max_total_norm`). A smaller lora_alpha makes them "
            "smaller",
        )
    ]


def coherence(module: JudgedModule) -> float | None:
    """The smaller one of what came and of what would be served; None where a figure is not finite.

    A NaN or an infinity anywhere in the factors shows in the float64 norm of their product.
    """
    came, served = module.came, module.served
    figures = (came.norm, *(module.similarity or ()), served.retained or 0.0)
    return min(came.coherence, served.coherence) if all(map(math.isfinite, figures)) else None


def check_sound(coherences: Mapping[str, float | None]) -> list[Reason]:
    """Whether the figures mean what they say.

    Ranks that cancel show in the coherence: rounding would decide what is left of them, not the policy.
    """
    infinite = [module for module, coherence in coherences.items() if coherence is None]
    reasons = by_cause(Fault("non_finite", module, _NOT_FINITE) for module in infinite)
    found = {m: c for m, c in coherences.items() if c is not None and not c >= _MIN_COHERENCE}
    if found:
        modules = sorted(found, key=found.__getitem__)
        cause = (
            f"the ranks cancel each other to {found[modules[0]]:.1e} of their squared norm; "
            f"{_MIN_COHERENCE:g} is the least that can be judged. Merge and factorise the delta again (a "
            "singular value decomposition of B·A)"
        )
        reasons.append(Reason("cancellation", f"{named(modules)}: {cause}"))
    return reasons
