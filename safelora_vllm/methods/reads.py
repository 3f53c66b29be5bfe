"""Which parts of the projector cache a policy reads: those that its method and its selection need.

A selection by threshold or number compares exact similarities, which take Ĉ or V. Where every module is
selected, the similarity is only reported: the bases that are read anyway, and as much of L, give an
interval that holds it (`methods.certified`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelora_vllm.methods import METHODS
from safelora_vllm.projectors.projector import Parts, lacks_operator

if TYPE_CHECKING:
    from safelora_vllm.policy import Policy
    from safelora_vllm.projectors.cache import ProjectorCache


def parts_read(policy: Policy) -> Parts:
    """What the gate reads of the cache under a policy."""
    method = METHODS[policy.method]
    energy = policy.energy if "energy" in method.options else 0.0
    operator = method.reads_operator or policy.select != "all"
    output = energy if method.reads_output_bases or not operator else 0.0
    return Parts(operator, energy, output)


def check_parts(policy: Policy, cache: ProjectorCache, named: str = "") -> None:
    """Find out before anything is judged whether the cache has the parts that a policy reads.

    Args:
        named: the cache in words, where its folder is not to be told.

    Raises:
        PolicyError: it was built with ``thin``, and the policy reads Ĉ or V.
    """
    if not (cache.thin and parts_read(policy).operator):
        return
    if METHODS[policy.method].reads_operator:
        others = " or ".join(repr(name) for name, method in METHODS.items() if not method.reads_operator)
        reader = f"`method` {policy.method!r} multiplies by one of them"
        instead = f"use `method` {others} with `select` 'all'"
    else:
        reader = f"`select` {policy.select!r} compares similarities, which need one of them"
        instead = "use `select` 'all'"
    raise lacks_operator(named or f"the projector cache {cache.folder}", reader, instead)
