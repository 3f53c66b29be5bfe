"""Selection by intervals: it takes all that exact similarities take, and marks what they might not take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safelora_vllm.methods.selection import Interval, Selection, by_number, by_threshold

_ENDS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1)  # often equal
_NAMES = st.text("abc", min_size=1, max_size=2)
_MODULES = st.dictionaries(_NAMES, st.tuples(_ENDS, _ENDS, _ENDS).map(sorted), max_size=8)
# The middle and error of an interval are rounded: the ends may be off by as much.
_ROUNDING = 1e-15


def intervals(modules: Mapping[str, list[float]]) -> dict[str, Interval]:
    """Of low ≤ value ≤ high."""
    return {
        n: Interval((low + high) / 2, (high - low) / 2 + _ROUNDING) for n, (low, _, high) in modules.items()
    }


def least(values: Mapping[str, float], number: int) -> set[str]:
    """The released code's choice."""
    return set(sorted(values, key=lambda name: (values[name], name))[:number])


@settings(max_examples=1500)
@given(_MODULES, _ENDS)
def test_a_threshold_takes_all_that_the_values_would_have_taken(
    modules: dict[str, list[float]], threshold: float
) -> None:
    found = by_threshold(intervals(modules), threshold)
    exact = {name for name, (_, value, _) in modules.items() if value <= threshold}
    assert exact <= found.projected
    assert found.projected - found.uncertain <= exact  # whoever is not marked is selected in any case
    for name, (low, _, high) in modules.items():
        if low > threshold + 1e-12:
            assert name not in found.projected
        elif high > threshold + 1e-12 and low < threshold - 1e-12:
            assert name in found.uncertain


@settings(max_examples=1500)
@given(_MODULES, st.integers(0, 9))
def test_a_number_takes_all_that_the_values_would_have_taken(
    modules: dict[str, list[float]], number: int
) -> None:
    found = by_number(intervals(modules), number)
    exact = least({name: value for name, (_, value, _) in modules.items()}, number)
    assert exact <= found.projected and found.uncertain <= found.projected
    assert found.projected - found.uncertain <= exact


@settings(max_examples=300)
@given(st.dictionaries(_NAMES, st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted), max_size=4),
       st.integers(0, 5))  # fmt: skip
def test_a_number_is_decided_as_all_possible_values_say(ends: dict[str, list[int]], number: int) -> None:
    """No module is selected, or marked, that every choice of values in the intervals decides alike."""
    given = {name: Interval((low + high) / 2, (high - low) / 2) for name, (low, high) in ends.items()}
    corners = itertools.product(*ends.values())
    choices = [least(dict(zip(ends, map(float, values), strict=True)), number) for values in corners]
    found = by_number(given, number)
    assert found.projected == set().union(*choices)
    assert found.projected - found.uncertain == set(ends).intersection(*choices)


@given(st.dictionaries(_NAMES, _ENDS, max_size=8), st.integers(0, 9), _ENDS)
def test_values_that_are_known_select_as_ever(
    values: dict[str, float], number: int, threshold: float
) -> None:
    known = {name: Interval.exact(value) for name, value in values.items()}
    assert by_number(known, number) == Selection(frozenset(least(values, number)))
    below = frozenset(name for name, value in values.items() if value <= threshold)
    assert by_threshold(known, threshold) == Selection(below)


def test_a_lower_end_at_the_threshold_is_projected() -> None:
    """The value may be the threshold itself, where the paper projects."""
    found = by_threshold({"at": Interval(0.75, 0.25), "above": Interval(0.75, 0.125)}, 0.5)
    assert found == ({"at"}, {"at"})


@pytest.mark.parametrize(
    "bad", [Interval(math.nan, math.nan), Interval(0.5, math.nan), Interval(math.nan, 0.0)]
)
def test_what_is_not_a_number_is_selected_and_pushes_nobody_out(bad: Interval) -> None:
    known = {name: Interval.exact(value) for name, value in (("a", 0.1), ("b", 0.2), ("c", 0.3))}
    assert by_threshold({**known, "x": bad}, 0.15).projected == {"a", "x"}
    assert by_number({**known, "x": bad}, 1).projected == {"a", "x"}
    assert by_number({**known, "x": bad}, 2).projected == {"a", "b", "x"}
    assert by_number({**known, "x": bad}, 0).projected == set()
