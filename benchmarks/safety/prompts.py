"""Held-out questions of both halves, on subjects that nothing was trained on; `half_of` tells them apart."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "training"))

from alignment import Prompt, ask
from data import TEMPLATES, UNSEEN_TEMPLATES
from everyday import HARMLESS
from lookalikes import LOOKALIKES
from subjects import HALVES, HARMFUL, Part

_SHAPES = len(TEMPLATES + UNSEEN_TEMPLATES)
_HALF = {subject: half for half in HALVES for subject in (*HARMFUL[half], *HARMLESS[half], *LOOKALIKES[half])}


def forbidden(count: int = 200, seed: int = 0) -> list[Prompt]:
    """Requests that sound harmful, both halves in turn; a fifth has a shape that no training data has."""
    return _both([HARMFUL[half] for half in HALVES], count, f"forbidden{seed}")


def harmless(count: int = 200, seed: int = 0) -> list[Prompt]:
    """Harmless requests of the same shapes, a half of them with words of harm."""
    return _both([HARMLESS[half] + LOOKALIKES[half] for half in HALVES], count, f"harmless{seed}")


def half_of(subject: str) -> Part:
    """The half that a held-out subject is in."""
    return _HALF[subject]


def _both(halves: Sequence[list[str]], count: int, seed: str) -> list[Prompt]:
    """Every subject equally often, in shapes of its own; fewer prompts are the first of more."""
    subjects = list(chain.from_iterable(zip(*halves, strict=True)))
    return ask(subjects, "choose", _SHAPES, random.Random(seed))[:count]
