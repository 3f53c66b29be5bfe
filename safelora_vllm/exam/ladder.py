"""The ladder of an exam: policies, mildest first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from safelora_vllm.errors import PolicyError
from safelora_vllm.policy import CAPS, Policy

if TYPE_CHECKING:
    from safelora_vllm.projectors.cache import ProjectorCache

DEFAULT = ",".join([*(f"input-removal:{energy}" for energy in (0.05, 0.1, 0.2, 0.4, 0.8)), "safe-lora"])
AS_UPLOADED, OPINION = "as-uploaded", "+opinion"
_STRENGTHS = {"input-removal": "energy", "csulora": "energy", "safe-lora": "threshold"}


def parse(text: str, caps: Policy) -> list[Policy]:
    """The policies of a text such as ``input-removal:0.1,safe-lora:0.35,safe-lora``.

    Args:
        text: a method each, after a colon its strength: the energy, of safe-lora the threshold. Without a
            strength safe-lora selects all modules, and other methods have their default energy. Or
            ``as-uploaded``, which projects nothing. After each, ``+opinion`` for a second opinion.
        caps: whose norm caps every rung has.

    Raises:
        PolicyError: a rung is no policy, or the ladder has none, one twice, or one after a stricter one.
    """
    given = [part.strip() for part in text.split(",")]
    rungs = [_rung(part, caps) for part in given]
    if len(set(rungs)) < len(rungs):
        raise PolicyError(f"the ladder {text!r} has a rung twice: expected each once, mildest first")
    for (earlier, stricter), (later, milder) in combinations(zip(given, rungs, strict=True), 2):
        if stricter.at_least_as_strict(milder):
            raise PolicyError(
                f"the ladder {text!r} has {later} after {earlier}, which is stricter: what fails {earlier} "
                "would be tried by milder rules. Give the rungs mildest first"
            )
    return rungs


def usable(cache: ProjectorCache, text: str | None, caps: Policy) -> list[Policy]:
    """The rungs of a text, or without one those of the default that the cache can serve.

    Raises:
        PolicyError: the text is no ladder, or has a rung that the cache cannot serve.
    """
    rungs = parse(DEFAULT if text is None else text, caps)
    found = served_by(cache, rungs)
    if text is not None and len(found) < len(rungs):
        missing = ", ".join(name_of(rung) for rung in rungs if rung not in found)
        raise PolicyError(
            f"the projector cache {cache.folder} has too few directions for {missing}: leave these rungs "
            "out, or build the cache with a larger `max_energy`"
        )
    return found


def served_by(cache: ProjectorCache, rungs: Sequence[Policy]) -> list[Policy]:
    """The rungs for which the cache has enough input directions."""
    from safelora_vllm.methods.input_removal import largest_energy

    most = largest_energy([cache.projector(name) for name in cache.modules])
    return [rung for rung in rungs if not rung.has_effect("energy") or rung.energy <= most]


def follows(rung: Policy, first: Policy, named: bool) -> bool:
    """Whether a rung may be tried after a policy that somebody chose. named: so may one of another method."""
    if rung.at_least_as_strict(first):
        return rung != first
    return named and not rung.selects_none and rung.method != first.method


def largest_bound(policy: Policy, ladder: Sequence[Policy], threshold: float) -> float:
    """The largest bound with which an adapter passes by a policy, nats per token.

    It is the threshold; and any that is finite where the ladder has a rung with a second opinion, and the
    policy is as strict as that: nothing is answered then that the aligned model refuses.
    """
    by_it = (dataclasses.replace(rung, **{cap: getattr(policy, cap) for cap in CAPS}) for rung in ladder)
    return math.inf if any(rung.opinion and policy.at_least_as_strict(rung) for rung in by_it) else threshold


def hardly_tried(ladder: Sequence[Policy]) -> str:
    """A warning of rungs that follow one with a second opinion; empty where there are none."""
    names = [name_of(rung) for rung in ladder]
    first = next((i for i, rung in enumerate(ladder) if rung.opinion), len(ladder))
    if not (after := names[first + 1 :]):
        return ""
    return (
        f"rungs after {names[first]} are hardly ever tried, as any score passes with a second opinion: put "
        f"{names[first]} last in the ladder, or leave out {', '.join(after)}"
    )


def projects_after(policy: Policy, ladder: Sequence[Policy]) -> str:
    """A warning, with a second opinion: a server's policy projects nothing, but the ladder's rungs do."""
    if not policy.selects_none or all(rung.selects_none for rung in ladder):
        return ""
    return (
        "--exam enforce beside --select none: an adapter that fails the exam as uploaded is projected by the "
        "next rungs of the ladder, and can lose its skill. To have such adapters served as uploaded, with "
        f"the second opinion, give --ladder {AS_UPLOADED},{AS_UPLOADED}{OPINION}"
    )


def name_of(policy: Policy) -> str:
    """A rung as `parse` reads it."""
    opinion = OPINION if policy.opinion else ""
    if policy.select == "none":
        return AS_UPLOADED + opinion
    field = _STRENGTHS[policy.method]
    if policy.method == "safe-lora" and policy.select == "all":
        return policy.method + opinion
    return f"{policy.method}:{getattr(policy, field):g}{opinion}"


def _rung(text: str, caps: Policy) -> Policy:
    given, opinion = text, text.endswith(OPINION)
    text = text.removesuffix(OPINION).rstrip()
    values: dict[str, Any] = {**{cap: getattr(caps, cap) for cap in CAPS}, "opinion": opinion}
    if text == AS_UPLOADED:
        return Policy.from_mapping({**values, "select": "none"})
    method, colon, strength = text.partition(":")
    if method == AS_UPLOADED:
        meant = AS_UPLOADED + (OPINION if opinion else "")
        raise PolicyError(
            f"the rung {given!r}: {AS_UPLOADED} takes no strength, as it projects nothing: write {meant}"
        )
    if method not in _STRENGTHS:
        raise PolicyError(
            f"{given!r} is not a valid rung: expected {AS_UPLOADED}, or one of {', '.join(_STRENGTHS)}, and "
            f"maybe a strength, such as input-removal:0.1; after it {OPINION} for a second opinion"
        )
    values["method"] = method
    if colon:
        try:
            values[_STRENGTHS[method]] = float(strength)
        except ValueError:
            raise PolicyError(
                f"the rung {given!r}: {strength!r} is not a valid strength of {method}: expected a number"
            ) from None
    elif method == "safe-lora":
        values["select"] = "all"
    try:
        policy = Policy.from_mapping(values)
    except PolicyError as error:  # the caps are those of a policy
        _, _, expected = str(error).partition(": ")
        raise PolicyError(f"the rung {given!r}: its strength is {strength.strip()}: {expected}") from None
    if colon and policy.is_idle(_STRENGTHS[method]):
        meant = AS_UPLOADED + (OPINION if opinion else "")
        raise PolicyError(f"on the rung {given!r} nothing is projected: if that is meant, name it {meant}")
    return policy
