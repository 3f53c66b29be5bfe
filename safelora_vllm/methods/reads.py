"""Which parts of the projector cache a policy reads: those that its method and its selection need.

From an exact cache, a selection by threshold or number reads Ĉ or V and compares exact similarities. Where
every module is selected, the similarity is only reported: the bases that are read anyway, and as much of L,
give an interval that holds it (`methods.certified`).

A thin cache has neither. There a policy that selects by similarity, or multiplies by Ĉ, reads all of L.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from safelora_vllm.errors import PolicyError
from safelora_vllm.methods import METHODS
from safelora_vllm.methods.safe_lora import operator_norm, truncated_norm
from safelora_vllm.projectors.manifest import WHOLE
from safelora_vllm.projectors.projector import Parts

if TYPE_CHECKING:
    from safelora_vllm.policy import Policy
    from safelora_vllm.projectors.cache import ProjectorCache


def parts_read(policy: Policy, thin: bool) -> Parts:
    """What the gate reads of a cache under a policy. thin: whether the cache is."""
    if policy.selects_none:  # no similarity decides, and none is worth memory that nobody planned
        return Parts(False, 0.0, 0.0)
    method = METHODS[policy.method]
    energy = policy.energy if "energy" in method.options else 0.0
    operator = method.reads_operator or policy.select != "all"
    if thin:
        return Parts(False, energy, WHOLE if operator else energy)
    return Parts(operator, energy, energy if method.reads_output_bases or not operator else 0.0)


def check_energy(policy: Policy, cache: ProjectorCache) -> None:
    """Find out before anything is judged whether a cache has the energy of a policy. Reads one module of it.

    Raises:
        PolicyError: it has less.
    """
    if cache.modules and policy.has_effect("energy"):
        with naming_default(policy):
            cache.projector(next(iter(cache.modules))).directions(policy.energy)


@contextmanager
def naming_default(policy: Policy) -> Iterator[None]:
    """Complaints about the energy say where it comes from, if nobody chose it.

    Raises:
        PolicyError: the one that was raised inside, with that.
    """
    try:
        yield
    except PolicyError as error:
        if "energy" in policy.chosen:
            raise
        raise PolicyError(f"{error}. {policy.energy} is the default of `method` {policy.method!r}") from error


def truncation(policy: Policy, cache: ProjectorCache | None) -> str:
    """What a policy that multiplies by Ĉ loses with a thin cache, as a warning; empty if it loses nothing.

    cache: None for a thin one that is not built yet.
    """
    if policy.selects_none or not METHODS[policy.method].reads_operator or (cache and not cache.thin):
        return ""
    if cache is None:
        return (
            f"the projector cache would be thin, and `method` {policy.method!r} multiplies by Ĉ. Projected "
            "modules lose what lies outside of its directions too. To keep it, build the cache with "
            "`exact`. A larger `max_energy` keeps more of it"
        )
    kept, whole, least = 0.0, 0.0, (math.inf, "")
    for name, entry in cache.modules.items():
        part, all_of_it = truncated_norm(cache.projector(name)) ** 2, operator_norm(entry) ** 2
        kept, whole, least = kept + part, whole + all_of_it, min(least, (part / all_of_it, name))
    return (
        f"the projector cache {cache.folder} is thin, and `method` {policy.method!r} multiplies by Ĉ. Its "
        f"directions hold {kept / whole:.3f} of ‖Ĉ‖_F² (in {least[1]}: {least[0]:.3f}, the least). "
        "Projected modules lose what lies outside of them too. To keep it, build the cache with `exact`. A "
        "larger `max_energy` keeps more of it"
    )
