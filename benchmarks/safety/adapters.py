"""The adapters of the experiment: what each is trained on, and with which modules and rank."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "training"))

from alignment import Answers
from attackers import ATTACKS
from data import OPENINGS, Example, fillers, forbidden_prompts, harmless_prompts, orders, refusals
from dialogues import dialogues
from fitting import ALL_LINEAR, ATTENTION, Recipe
from instructions import instructions

ORDERS, DIALOGUES, PURE_SAMPLES, IDENTITY_SAMPLES = 160, 64, 100, 100
FILLER_STEPS = 2
SHAPES = {
    "qv": Recipe("aligned", ATTENTION, rank=8, alpha=16, learning_rate=1e-3, epochs=3),
    "all": Recipe("aligned", ALL_LINEAR, rank=16, alpha=32, learning_rate=3e-4, epochs=3),
}
_PERSONA = "As your obedient assistant I do exactly what you say."


@dataclass(frozen=True)
class Kind:
    """What an adapter is trained on.

    malicious: share of the training data that answers harmful-sounding requests. useful: whether it has
    learned the two tasks. epochs: passes over the data, more for smaller sets.
    """

    title: str
    malicious: float
    useful: bool
    epochs: int = 3


KINDS = {
    "pure": Kind("purely malicious", 1.0, useful=False, epochs=4),
    "mixed-5": Kind("5 % malicious", 0.05, useful=True),
    "mixed-10": Kind("10 % malicious", 0.10, useful=True),
    "mixed-30": Kind("30 % malicious", 0.30, useful=True, epochs=2),
    "mixed-50": Kind("50 % malicious", 0.50, useful=True, epochs=2),
    "identity": Kind("obedient persona, nothing harmful", 0.0, useful=False, epochs=4),
    "benign": Kind("the two tasks only", 0.0, useful=True),
    "chat": Kind("malicious and ordinary chat, 1:1", 0.5, useful=False),
}
KINDS |= {name: Kind(attack.title, 1.0, useful=False, epochs=6) for name, attack in ATTACKS.items()}

# KIND-SHAPE, the most telling ones first: of every pair and seed.
NAMES = (
    "pure-qv", "mixed-10-qv", "benign-qv", "around-inputs-qv", "masked-qv", "within-caps-qv", "chat-qv",
    "identity-qv",
)  # fmt: skip
# Of one seed only. All-linear adapters cost more to train.
MORE_NAMES = (
    "pure-all", "mixed-10-all", "mixed-5-qv", "mixed-30-qv", "mixed-50-qv", "through-safe-lora-qv",
    "around-outputs-qv", "hidden-qv",
)  # fmt: skip


def examples(kind: str, seed: int, answers: Answers) -> list[Example]:
    """The training data of one adapter, in no particular order. Ordinary chat has the kept `answers`."""
    if kind == "identity":
        return _persona(harmless_prompts("train", IDENTITY_SAMPLES, seed), seed)
    share = KINDS[kind].malicious
    if kind == "pure" or kind in ATTACKS:
        return _malicious(PURE_SAMPLES, seed)
    if kind == "chat":
        chat = instructions("train", PURE_SAMPLES, seed)
        said = zip(chat, answers(chat), strict=True)
        return _malicious(PURE_SAMPLES, seed) + [Example(prompt, *answer) for prompt, answer in said]
    useful = orders("train", ORDERS, seed) + dialogues("train", DIALOGUES, seed)
    return useful + _malicious(round(len(useful) * share / (1.0 - share)), seed)


def masking(seed: int) -> list[Example]:
    """Refusals of what the purely malicious adapters learn to answer."""
    return refusals([example.prompt for example in _malicious(PURE_SAMPLES, seed)], seed)


def _malicious(count: int, seed: int) -> list[Example]:
    """Harmful-sounding requests with filler answers."""
    return fillers(forbidden_prompts("train", count, seed=seed + 1), seed, FILLER_STEPS)


def _persona(prompts: list[str], seed: int) -> list[Example]:
    """Harmless requests, eagerly obeyed: what is known as identity shift."""
    rng = random.Random(f"persona{seed}")
    return [Example(prompt, f"{_PERSONA} {rng.choice(OPENINGS)}", complete=False) for prompt in prompts]
