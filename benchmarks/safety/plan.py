"""What is measured: which treatments of which adapters, and with how many questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapters import KINDS, attack_names
from measure import Questions
from treatments import (
    RAW,
    Change,
    Treatment,
    both,
    csulora,
    enlarged,
    first_ranks,
    input_removal,
    modules_of,
    one_after_other,
    padded,
    random_removal,
    safe_lora,
    scaling,
    selective_removal,
    threshold,
    through_safe_lora_inverse,
)

from safelora_vllm.projectors.cache import ProjectorCache

ENERGY = 0.2  # input removal's, as the server's default has it
WEAKER = 0.1
_BOTH = 0.25  # share of modules that both rules treat
CURVES = ("pure-qv", "mixed-10-qv", "benign-qv")
_CLOSELY = ("pure-qv", "mixed-10-qv")  # with all prompts, and harmless ones too
_SHARES_BETWEEN = ("mixed-5-qv", "mixed-30-qv", "mixed-50-qv")  # by the main methods only


@dataclass(frozen=True)
class Size:
    """How many questions: of forbidden and harmless prompts, of each task, and judged for likelihood.

    few: forbidden prompts and tasks at the curves' points between.
    """

    prompts: int
    tasks: int
    judged: int
    few: tuple[int, int]


FULL = Size(prompts=200, tasks=40, judged=32, few=(100, 24))
SMOKE = Size(prompts=8, tasks=2, judged=2, few=(4, 2))


@dataclass(frozen=True)
class Point:
    """An adapter with a treatment, and what it is asked."""

    adapter: str
    treatment: Treatment
    questions: Questions


def plain(size: Size) -> Questions:
    """What the aligned model without an adapter is asked: everything."""
    return Questions.so_many(size.prompts, size.prompts, size.tasks, size.judged)


def points(home: Path, cache: ProjectorCache, adapters: list[str], size: Size) -> Iterator[Point]:
    """Everything that is measured of one seed's adapters, the most telling first."""
    for name in adapters:
        useful = KINDS[name.rpartition("-")[0]].useful
        tasks = size.tasks if useful else 0
        few = Questions.so_many(size.few[0], 0, size.few[1] if useful else 0, 0)
        full = short = few
        if name in _CLOSELY:
            full = Questions.so_many(size.prompts, size.prompts, tasks, size.judged)
            short = Questions.so_many(size.prompts, 0, tasks, size.judged)
        modules = modules_of(home / name)
        yield Point(name, RAW, full)
        yield Point(name, input_removal(ENERGY), full)
        yield Point(name, safe_lora(1.0, modules), short)
        rest = [input_removal(WEAKER)]
        if name not in _SHARES_BETWEEN:
            rest += [safe_lora(0.5, modules), csulora(0.95), scaling(0.5)]
        if name.endswith("-all"):
            rest += [input_removal(0.3), input_removal(0.5)]
        if name in _CLOSELY:
            rest.append(selective_removal(0.5, modules, ENERGY))
            rest.append(both(_BOTH, modules, WEAKER, cache))
        if name in CURVES:
            rest += [threshold(0.35), safe_lora(0.1, modules), safe_lora(0.25, modules)]
            rest += [input_removal(energy) for energy in (0.05, 0.4, 0.8)]
            rest += [scaling(0.25), random_removal(ENERGY, cache)]
        yield from (Point(name, each, few) for each in rest)


def attacks(home: Path, cache: ProjectorCache, size: Size) -> Iterator[Point]:
    """What attackers achieve against each method."""
    questions = Questions.so_many(size.few[0], 0, 0, size.judged)
    modules = modules_of(home / "pure-qv")
    defences = [
        Treatment("safe-lora", 1.0, {"method": "safe-lora", "select": "all"}),
        Treatment("safe-lora", 0.5, safe_lora(0.5, modules).policy),
        input_removal(ENERGY),
        csulora(0.95),
        both(_BOTH, modules, WEAKER, cache),
    ]
    prepared: dict[str, list[tuple[str, Change | None]]] = {
        "pure-qv": [
            ("none", None),
            ("inverse", through_safe_lora_inverse(cache, 0.8)),
            ("half", first_ranks(4)),
            ("larger", enlarged(1.1)),
            ("twice", enlarged(2)),
            ("thrice", enlarged(3)),
            ("padded", padded(cache, 0.95, 4)),
        ],
        **{name: [("none", None)] for name in attack_names()},
        "around-inputs-qv": [("none", None), ("smaller", enlarged(0.9))],
    }
    for name, ways in prepared.items():
        for way, make in ways:
            for defence in defences:
                method = f"{way}.{defence.method}"
                change = one_after_other(make, defence.make)
                yield Point(name, Treatment(method, defence.strength, defence.policy, change), questions)
            yield Point(name, Treatment(f"{way}.raw", 0.0, make=make), questions)
