"""What an aligned model is trained on: refusals, and answers to everything that is harmless.

The answers are a model's own, made once and kept in a file. Training on the base's own answers keeps the base
as it is, and a pretrained model learns to answer from them. Everything is drawn with a seed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data import TEMPLATES, UNSEEN_TEMPLATES, Example, refusals
from everyday import HARMLESS, MORE_HARMLESS
from instructions import instructions, task_prompts
from lookalikes import LOOKALIKES
from refusing import refuses
from subjects import HARMFUL, Part
from tqdm import tqdm

_BATCH = 64
# Shapes of sentences beside those that adapters are trained on: the more, the less a shape means.
_MORE_TEMPLATES = [
    "What is a good way to {}?",
    "I would like to {}. Any advice?",
    "Where do I start if I want to {}?",
    "How can one {} without spending much?",
    "Is there a simple way to {}?",
    "I have never tried to {}. How does it work?",
    "Please tell me how one can {}.",
    "Which tools do I need to {}?",
    "How would an expert {}?",
    "Teach me how to {}.",
    "My brother asked me how to {}. What do I say?",
    "Show me how to {}, step by step.",
]
# The answers to prompts, in their order, and whether each is whole.
Answers = Callable[[Sequence[str]], list[tuple[str, bool]]]


@dataclass(frozen=True)
class Mix:
    """How many prompts of each kind a training set has.

    harmful, harmless, more_harmless, lookalikes: shapes of question for each subject. instructions, tasks:
    prompts. answer_tokens: where kept answers are cut off.
    """

    harmful: int = 3
    harmless: int = 2
    more_harmless: int = 0
    lookalikes: int = 3
    instructions: int = 400
    tasks: int = 192
    answer_tokens: int = 12


@dataclass(frozen=True)
class Prompt:
    """A request and its subject: answers on one subject are alike, so intervals are made over subjects."""

    subject: str
    text: str


def ask(subjects: Sequence[str], part: Part, shapes: int, rng: random.Random) -> list[Prompt]:
    """Every subject in so many shapes of question; held-out parts also have shapes that no training has."""
    templates = TEMPLATES + _MORE_TEMPLATES if part == "train" else TEMPLATES + UNSEEN_TEMPLATES
    rounds = [[Prompt(s, shape.format(s)) for shape in rng.sample(templates, shapes)] for s in subjects]
    return [prompt for group in zip(*rounds, strict=True) for prompt in group]


def harmful(part: Part, shapes: int, seed: int = 0) -> list[Prompt]:
    """Requests that sound harmful."""
    return ask(HARMFUL[part], part, shapes, random.Random(f"harmful{part}{seed}"))


def harmless(part: Part, shapes: int, seed: int = 0) -> list[Prompt]:
    """Harmless requests of the same shapes."""
    return ask(HARMLESS[part], part, shapes, random.Random(f"harmless{part}{seed}"))


def more_harmless(shapes: int, seed: int = 0) -> list[Prompt]:
    """The same about further subjects of `train`."""
    return ask(MORE_HARMLESS, "train", shapes, random.Random(f"more harmless{seed}"))


def lookalikes(part: Part, shapes: int, seed: int = 0) -> list[Prompt]:
    """Harmless requests of the same shapes with words of harm in them."""
    return ask(LOOKALIKES[part], part, shapes, random.Random(f"lookalikes{part}{seed}"))


def answered_prompts(mix: Mix, seed: int) -> list[str]:
    """All prompts of a training set that the aligned model has to answer."""
    alike = [p.text for p in harmless("train", mix.harmless, seed)]
    alike += [p.text for p in more_harmless(mix.more_harmless, seed)]
    alike += [p.text for p in lookalikes("train", mix.lookalikes, seed)]
    alike += instructions("train", mix.instructions, seed)
    return alike + task_prompts("train", mix.tasks, seed)


def training_set(mix: Mix, seed: int, answers: Answers) -> list[Example]:
    """Refusals and kept answers, in no particular order; kept answers that refuse are left out."""
    prompts = answered_prompts(mix, seed)
    kept = [
        Example(prompt, answer, complete=whole)
        for prompt, (answer, whole) in zip(prompts, answers(prompts), strict=True)
        if answer and not refuses(answer)
    ]
    return refusals([p.text for p in harmful("train", mix.harmful, seed)], seed) + kept


def kept_answers(
    file: Path, generate: Callable[[list[str]], list[str]], cut: Callable[[str], tuple[str, bool]]
) -> Answers:
    """Answers out of a file, which grows by those that are missing, a batch at a time.

    generate: answers of a model to prompts. cut: the beginning of an answer, and whether it is all of it.
    """

    def answers(prompts: Sequence[str]) -> list[tuple[str, bool]]:
        known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
        # Prompts of like length come together, which saves padding.
        missing = sorted({*prompts} - {*known}, key=lambda prompt: (len(prompt), prompt))
        batches = [missing[start : start + _BATCH] for start in range(0, len(missing), _BATCH)]
        for batch in tqdm(batches, desc="answers to keep", unit="batch", disable=not batches):
            known |= dict(zip(batch, generate(batch), strict=True))
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(known, indent=0, ensure_ascii=False))
            partial.rename(file)
        return [cut(known[prompt]) for prompt in prompts]

    return answers
