"""Which aligned model is tried when one fails the check: another strength, and then other data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from check import Figures

DRAWS = 4  # of the data of an aligned model, at most
STRENGTHS = (0.8, 0.9, 1.0, 1.15, 1.3)  # how much an aligned model has of what training changed


@dataclass(frozen=True)
class Trial:
    """A draw of the data, from 0, and how much of what training changed is tried of it."""

    draw: int
    strength: float


def trials(failed: Iterable[Figures]) -> Iterator[Trial]:
    """Those of the models that failed, given their figures in order, and then the one that comes next.

    A model that refuses too much is followed by a weaker one of the same draw, one that answers too much by a
    stronger one. A draw ends with the last strength, with a model that does both, and where a strength would
    be tried again.
    """
    draw, tried = 0, [1.0]
    yield Trial(draw, tried[-1])
    for figures in failed:
        place = STRENGTHS.index(tried[-1]) + figures.answers_too_much - figures.refuses_too_much
        if place in range(len(STRENGTHS)) and STRENGTHS[place] not in tried:
            tried.append(STRENGTHS[place])
        else:
            draw, tried = draw + 1, [1.0]
        yield Trial(draw, tried[-1])
