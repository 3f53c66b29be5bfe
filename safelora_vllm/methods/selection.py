"""Which modules are projected, by intervals that hold their similarities.

A module stays as it is only where that is certain. So the modules that the exact similarities would select
are always among those that their intervals select; intervals of width 0 select exactly these.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import NamedTuple


class Interval(NamedTuple):
    """``middle`` ± ``error``."""

    middle: float
    error: float

    @classmethod
    def exact(cls, value: float) -> Interval:
        """A value that is known."""
        return cls(value, 0.0)

    @property
    def low(self) -> float:
        """The lower end; -∞ where the interval is not a number."""
        low = self.middle - self.error
        return -math.inf if math.isnan(low) else low

    @property
    def high(self) -> float:
        """The upper end; ∞ where the interval is not a number."""
        high = self.middle + self.error
        return math.inf if math.isnan(high) else high


class Selection(NamedTuple):
    """Names of modules.

    projected: the selected ones. uncertain: those of them that the exact similarity might leave alone.
    """

    projected: frozenset[str]
    uncertain: frozenset[str] = frozenset()


def by_threshold(similarities: Mapping[str, Interval], threshold: float) -> Selection:
    """Modules whose similarity may be at most the threshold (paper, eq. 2)."""
    projected = frozenset(name for name, found in similarities.items() if found.low <= threshold)
    return Selection(projected, frozenset(n for n in projected if similarities[n].high > threshold))


def by_number(similarities: Mapping[str, Interval], number: int) -> Selection:
    """Modules that may be among the ``number`` least similar ones, as in the paper's released code.

    Equal similarities are ordered by name, so that the choice is stable. A module stays as it is where at
    least ``number`` others are certainly before it: their upper end is below its lower end. It is certainly
    selected where fewer than ``number`` others may be before it.
    """
    lows = sorted((found.low, name) for name, found in similarities.items())
    highs = sorted((found.high, name) for name, found in similarities.items())
    projected, uncertain = set(), set()
    for name, found in similarities.items():
        if bisect_left(highs, (found.low, name)) >= number:
            continue
        projected.add(name)
        others = bisect_left(lows, (found.high, name)) - (found.low < found.high)  # without itself
        if others >= number:
            uncertain.add(name)
    return Selection(frozenset(projected), frozenset(uncertain))
