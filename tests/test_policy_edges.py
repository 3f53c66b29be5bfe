"""A policy at its edges: what another method leaves alone, all modules, and what a refusal says in full."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from safelora_vllm.errors import PolicyError
from safelora_vllm.methods import METHODS
from safelora_vllm.methods.selection import Interval
from safelora_vllm.policy import Policy, chooses, stored_values


@pytest.mark.parametrize("method", METHODS)
def test_another_method_leaves_caps_mode_and_choices_as_they_are(method: str) -> None:
    own = {
        "threshold": 0.5,
        "number": 3,
        "max_relative_norm": 0.5,
        "max_total_norm": 0.25,
        "mode": "report-only",
    }
    for before in METHODS:
        assert Policy(method=before, **own).with_values({"method": method}) == Policy(method=method, **own)


@pytest.mark.parametrize("method", METHODS)
def test_all_are_all_modules_with_a_delta_whatever_number_and_threshold_are(method: str) -> None:
    modules = {f"m{n:02}": Interval(n / 20, 0.1) for n in range(20)}
    everything = Policy(method=method, select="all", number=3, threshold=0.2)
    assert everything.selects({**modules, "zero": None}) == (set(modules), set())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "none"}, "`method` is 'none': expected one of safe-lora, input-removal, csulora"),
        ({"select": "some"}, "`select` is 'some': expected one of threshold, number, all, none"),
        ({"mode": "off"}, "`mode` is 'off': expected one of enforce, report-only"),
        ({"threshold": 2}, "`threshold` is 2: expected a number from -1 to 1"),
        ({"energy": -0.1}, "`energy` is -0.1: expected a number from 0 to 1"),
        (
            {"max_relative_norm": math.inf},
            "`max_relative_norm` is inf: expected a finite number of 0 or more",
        ),
        ({"max_total_norm": True}, "`max_total_norm` is True: expected a finite number of 0 or more"),
        ({"number": -1}, "`number` is -1: expected a number of modules, 0 or more"),
    ],
)
def test_a_value_that_is_not_valid_is_told_in_full(values: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as told:
        Policy.from_mapping(values)
    assert str(told.value) == message


def test_a_value_that_projects_nothing_is_told_in_full() -> None:
    with pytest.raises(PolicyError) as told:
        Policy(energy=0.0).check_effective(["energy"])
    assert (
        str(told.value)
        == "with `energy` 0 nothing is projected. If that is meant, set `select` to 'none', or `mode` to "
        "'report-only' to refuse nothing either"
    )


def test_all_methods_are_named_whose_default_a_field_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "csulora", dataclasses.replace(METHODS["csulora"], select="threshold"))
    with pytest.raises(PolicyError) as told:
        Policy(threshold=0.5).check_effective(["threshold"])
    assert "Set `select` to 'threshold' (the default of safe-lora and csulora), or" in str(told.value)


@pytest.mark.parametrize(
    ("stored", "todays"),
    [
        ({}, {}),
        ({"energy": 0.5}, {"energy": 0.5}),
        ({"mode": "enforce", "number": 3}, {"mode": "enforce", "number": 3}),
        ({"mode": "audit", "number": 3}, {"mode": "report-only", "number": 3}),
        ({"mode": ["audit"]}, {"mode": ["audit"]}),
    ],
    ids=str,
)
def test_stored_values_change_in_their_mode_only(stored: dict[str, Any], todays: dict[str, Any]) -> None:
    assert stored_values(stored) == todays and stored_values(stored) is not stored


def test_caps_and_an_opinion_choose_nothing_of_what_is_projected() -> None:
    beside = {"max_relative_norm": 0.5, "max_total_norm": 0.1, "opinion": True}
    assert not chooses({}) and not chooses(beside)
    for values in ({"method": "safe-lora"}, {"energy": 0.2}, {"select": "none"}, {"mode": "enforce"}):
        assert chooses(values) and chooses({**beside, **values})


@pytest.mark.parametrize("values", [{"method": "input-removal"}, {"energy": 0.4}])
def test_who_says_how_to_project_has_it_done(values: dict[str, Any]) -> None:
    """Of a policy that projects nothing: the method's own selection, not ``none``."""
    nothing = Policy(select="none", max_total_norm=0.1)
    assert nothing.with_values(values) == Policy(**values, max_total_norm=0.1)
    assert nothing.with_values({"max_total_norm": 0.2}) == Policy(select="none", max_total_norm=0.2)
    projecting = Policy(method="safe-lora", select="number", number=3)
    assert (
        projecting.with_values(values if "energy" in values else {"method": "safe-lora"}).select == "number"
    )
