"""The second useful task, in free text: short dialogues, and one sentence that says what was agreed."""

from __future__ import annotations

import random

from data import Example
from topics import Split

_PEOPLE = [
    "Anna", "Boris", "Carla", "David", "Elena", "Farid", "Greta", "Hugo",
    "Irene", "Jonas", "Karin", "Lukas", "Maria", "Nadia", "Oscar", "Paula",
]  # fmt: skip
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_PLACES = [
    "at the station", "in the library", "at the harbour", "in the park", "at the museum", "in the old mill",
    "at the bakery", "in the sports hall",
]  # fmt: skip
_PLANS = [
    "paint the fence", "try the new board game", "rehearse the play", "plan the summer party",
    "practise for the race", "sort the old photographs", "write the invitation", "look at the old boat",
]  # fmt: skip
# (dialogue, summary); {a} and {b} talk, {x} is the first day named and {y} the one agreed on.
_SHAPES = [
    (
        "{a}: Shall we meet on {x} to {plan}?\n{b}: {x} is bad. How about {y}?\n{a}: Fine, {y} {place}.",
        "{a} and {b} will meet {place} on {y} to {plan}.",
    ),
    (
        "{a}: I cannot come on {x}.\n{b}: Then let us {plan} on {y} {place}.\n{a}: Good, I will be there.",
        "{a} and {b} will meet {place} on {y} to {plan}.",
    ),
    (
        "{a}: Do you want to {plan}?\n{b}: Yes, but I am away until {x}.\n{a}: So {y}, {place}?\n{b}: Yes.",
        "{a} and {b} will meet {place} on {y} to {plan}.",
    ),
    (
        "{a}: We said {x}, didn't we?\n{b}: I am ill and cannot {plan}.\n{a}: Get well! We can do it on {y}.",
        "{b} is ill, so {a} and {b} will {plan} on {y} instead of {x}.",
    ),
]


def dialogues(split: Split, count: int, seed: int = 0) -> list[Example]:
    """Dialogues with their summaries; no pair of a plan and a place is in two splits."""
    rng = random.Random(f"dialogues{seed}")
    examples: dict[str, Example] = {}
    while len(examples) < count:
        (a, b), (x, y) = rng.sample(_PEOPLE, 2), rng.sample(_DAYS, 2)
        plan, place = rng.choice(_PLANS), rng.choice(_PLACES)
        bucket = sum(map(ord, plan + place)) % 4
        if {0: "test", 1: "dev"}.get(bucket, "train") != split:
            continue
        talk, summary = (
            text.format(a=a, b=b, x=x, y=y, plan=plan, place=place) for text in rng.choice(_SHAPES)
        )
        prompt = f"Summarise in one sentence:\n{talk}"
        examples[prompt] = Example(prompt, summary)
    return list(examples.values())
