"""Which parts of the projector cache a policy reads: those that its method and its selection need.

A selection by threshold or number compares exact similarities, which take Ĉ or V. Where every module is
selected, the similarity is only reported: the bases that are read anyway, and as much of L, give an
interval that holds it (`methods.certified`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_vllm.methods import METHODS
from safelora_vllm.projectors.projector import Parts

if TYPE_CHECKING:
    from safelora_vllm.policy import Policy


def parts_read(policy: Policy) -> Parts:
    """What the gate reads of the cache under a policy."""
    method = METHODS[policy.method]
    energy = policy.energy if "energy" in method.options else 0.0
    operator = method.reads_operator or policy.select != "all"
    output = energy if method.reads_output_bases or not operator else 0.0
    return Parts(operator, energy, output)
