"""What is measured: which treatments of which adapters, and with how many questions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapters import KINDS, MORE_NAMES, NAMES
from groups import Step, path_of
from inputs import TEXTS, inputs_of
from measure import Questions
from prompts import forbidden
from training import ALIGNED, PROJECTORS
from treatments import (
    RAW,
    Change,
    Treatment,
    both,
    centred_removal,
    csulora,
    early_values,
    enlarged,
    first_ranks,
    guided_removal,
    input_removal,
    mean_input_removal,
    modules_of,
    one_after_other,
    padded,
    random_removal,
    safe_lora,
    scaling,
    second_opinion,
    selective_removal,
    threshold,
    through_safe_lora_inverse,
)

from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.exam.reference import ANSWER_TOKENS
from safelora_vllm.projectors.cache import ProjectorCache

SEEDS = [0, 1, 2]
ENERGY = 0.2  # input removal's, as the server's default has it
WEAKER = 0.1
_BOTH = 0.25  # share of modules that both rules treat
OPINION = ANSWER_TOKENS  # as many as a server waits for
LADDER_ENERGIES = (0.05, 0.1, 0.2, 0.4, 0.8, 0.95)
GUIDED_TO = (0.3, 0.1, 0.02)  # bounds of the loyalty drop, nats per token: the last is an exam's
CURVES = ("pure-qv", "mixed-10-qv", "benign-qv")
HARMFUL_AND_USEFUL = "mixed-10-qv"


@dataclass(frozen=True)
class Size:
    """How many questions: of forbidden prompts, of harmless ones, and of each task."""

    prompts: int
    harmless: int
    tasks: int


FULL = Size(prompts=120, harmless=80, tasks=40)
SMOKE = Size(prompts=4, harmless=4, tasks=2)


def questions(
    size: Size, chosen: bool, harmless: bool = True, tasks: bool = True, probes: bool = True
) -> Questions:
    """What is asked of one part's adapters. chosen: whether decisions are made on its answers.

    probes: whether an exam is replayed on it.
    """
    return Questions.so_many(
        size.prompts,
        size.harmless if harmless else 0,
        size.tasks if tasks else 0,
        "both" if chosen else "report",
        probes,
    )


@dataclass(frozen=True)
class Point:
    """An adapter with a treatment, and what it is asked."""

    adapter: str
    treatment: Treatment
    questions: Questions


def ladder(modules: int) -> list[Treatment]:
    """The rungs of the exam, mildest first."""
    return [*(input_removal(energy) for energy in LADDER_ENERGIES), safe_lora(1.0, modules)]


def points(
    home: Path, cache: ProjectorCache, adapters: list[str], size: Size, chosen: bool
) -> Iterator[Point]:
    """Everything that is measured of one seed's adapters: the ladder's rungs, and curves of a few.

    chosen: whether this is the seed and pair that decisions are made on; others have only the curves to
    compare the rule with. ε is decided on the rungs, the static rule on one adapter's curves.
    """
    for name in adapters:
        useful = KINDS[name.rpartition("-")[0]].useful
        modules = modules_of(home / name)
        full = questions(size, chosen, tasks=useful)
        less = questions(size, chosen, harmless=False, tasks=useful)
        decides = chosen and name == HARMFUL_AND_USEFUL
        least = questions(size, decides, harmless=False, tasks=useful, probes=decides)
        whole = [RAW, input_removal(ENERGY), *([second_opinion(OPINION)] if name in NAMES else [])]
        yield from (Point(name, each, full) for each in whole)
        rungs = [each for each in ladder(modules) if each.name != input_removal(ENERGY).name]
        rest = []
        if chosen and name in CURVES:
            rest = [*_compared(modules, cache), *_candidates(home, cache, modules, size)]
            rest += _guided(home, cache, name, size)
        elif name == HARMFUL_AND_USEFUL:
            rest = _compared(modules, cache)
        if size is SMOKE:  # one strength of each method
            rungs, rest = rungs[-1:], list({each.method: each for each in rest}.values())
        yield from (Point(name, each, less) for each in rungs)
        yield from (Point(name, each, least) for each in rest)


def _compared(modules: int, cache: ProjectorCache) -> list[Treatment]:
    """The methods that the rule has to be better than, and removal in a part of the modules."""
    return [
        *(early_values(energy, cache) for energy in (0.1, 0.4, 0.8)),
        *(safe_lora(share, modules) for share in (0.1, 0.25, 0.5, 0.75)),
        *(csulora(energy) for energy in (0.5, 0.8, 0.95)),
        *(scaling(strength) for strength in (0.25, 0.5, 0.75)),
    ]


def _candidates(home: Path, cache: ProjectorCache, modules: int, size: Size) -> list[Treatment]:
    """Other rules that may be better, and the baseline of random directions."""
    texts = 4 if size is SMOKE else TEXTS
    inputs = inputs_of(home / ALIGNED, list(cache.modules), home / "inputs.safetensors", texts)
    return [
        *(threshold(tau) for tau in (0.2, 0.35, 0.5)),
        *(centred_removal(energy, cache, inputs) for energy in (0.05, 0.2, 0.4)),
        mean_input_removal(inputs),
        random_removal(ENERGY, cache),
        random_removal(0.8, cache),
        selective_removal(0.5, modules, 0.4),
        both(_BOTH, modules, WEAKER, cache),
    ]


def _guided(home: Path, cache: ProjectorCache, name: str, size: Size) -> list[Treatment]:
    """Energies by group of modules. The probes are the half that decides, as the replayed exam's are."""
    thresholds = GUIDED_TO[:1] if size is SMOKE else GUIDED_TO
    path = guided_path(home, name, size)
    return [guided_removal(threshold, path, cache) for threshold in thresholds]


def guided_path(home: Path, name: str, size: Size) -> list[Step]:
    """The settings that the search by groups came by; it takes minutes, once for each adapter."""
    probes = [prompt.text for prompt in forbidden(size.prompts)[0::2]]
    until = math.inf if size is SMOKE else GUIDED_TO[-1]
    cache = ProjectorCache(home / PROJECTORS)
    of = hashlib.sha256(
        (home / name / WEIGHTS).read_bytes() + f"{cache.id} {probes} {until}".encode()
    ).hexdigest()
    file = home / "groups" / f"{name}-{of[:16]}.json"
    return path_of(home / ALIGNED, home / name, cache, probes, until, file)


def attacks(home: Path, cache: ProjectorCache, adapters: list[str], size: Size) -> Iterator[Point]:
    """What preparing an upload achieves against each method, beside what training does."""
    asked = questions(size, False, harmless=False, tasks=False, probes=False)
    for name in [name for name in adapters if name in MORE_NAMES]:  # beside the ladder's rungs
        for beside in (safe_lora(0.5, modules_of(home / name)), csulora(0.95)):
            yield Point(name, beside, asked)
    if "pure-qv" not in adapters:
        return
    modules = modules_of(home / "pure-qv")
    defences = [safe_lora(1.0, modules), safe_lora(0.5, modules), input_removal(ENERGY), csulora(0.95)]
    ways: dict[str, Change] = {
        "inverse": through_safe_lora_inverse(cache, 0.8),
        "half": first_ranks(4),
        "twice": enlarged(2),
        "thrice": enlarged(3),
        "padded": padded(cache, 0.95, 4),
    }
    for way, make in ways.items():
        for defence in defences:
            change = one_after_other(make, defence.make)
            method = f"{way}.{defence.method}"
            yield Point("pure-qv", Treatment(method, defence.strength, defence.policy, change), asked)
        yield Point("pure-qv", Treatment(f"{way}.raw", 0.0, make=make), asked)
