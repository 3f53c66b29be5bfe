"""What an operator can and cannot ask for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelora_vllm.errors import PolicyError
from safelora_vllm.methods import METHODS
from safelora_vllm.methods.selection import Interval
from safelora_vllm.policy import Policy, stored_values

_SIMILARITIES = st.dictionaries(
    st.text("abc.", min_size=1, max_size=4), st.none() | st.floats(-1, 1), min_size=1, max_size=20
)


def test_the_defaults() -> None:
    assert dataclasses.asdict(Policy()) == {
        "method": "input-removal",
        "select": "all",
        "threshold": 0.35,
        "number": 10,
        "energy": 0.2,
        "max_relative_norm": 1.0,
        "max_total_norm": 1.0,
        "mode": "enforce",
        "opinion": False,
    }
    assert {method for method in METHODS if Policy(method=method).select != "all"} == {"safe-lora"}
    assert Policy(method="input-removal", select="threshold").select == "threshold"
    assert Policy().enforcing and not Policy(mode="report-only").enforcing


def test_safe_loras_defaults_are_the_papers() -> None:
    paper = Policy(method="safe-lora")
    assert (paper.select, paper.threshold, paper.number) == ("threshold", 0.35, 10)


def test_another_method_has_its_own_defaults_unless_they_are_given() -> None:
    safe = Policy().with_values({"method": "safe-lora"})
    assert safe == Policy(method="safe-lora") and safe.select == "threshold"
    assert safe.with_values({"method": "input-removal"}) == Policy()
    assert safe.with_values({"method": "csulora", "select": "number"}).select == "number"
    assert Policy(energy=0.5).with_values({"method": "csulora"}).energy == 0.95
    assert Policy(method="csulora").with_values({"method": "input-removal"}).energy == Policy().energy == 0.2
    assert Policy(method="csulora", energy=0.5).with_values({"mode": "report-only"}).energy == 0.5
    chosen = Policy(method="safe-lora", select="all")
    assert chosen.with_values({"threshold": 0.5}).select == "all"


@pytest.mark.parametrize(
    "values",
    [
        {"method": "none"}, {"method": ""}, {"method": None}, {"method": ["safe-lora"]},
        {"select": "some"}, {"select": True}, {"select": None}, {"select": []}, {"select": 0},
        {"mode": "off"}, {"mode": ""}, {"number": -(10**4000)}, {"energy": 10**4000},
        {"threshold": 1.01}, {"threshold": -1.01}, {"threshold": math.nan}, {"threshold": "0.3"},
        {"threshold": True}, {"threshold": None}, {"threshold": [0.3]},
        {"energy": 1.1}, {"energy": -0.1}, {"energy": math.nan},
        {"max_total_norm": -1}, {"max_total_norm": math.inf},
        {"max_relative_norm": -1}, {"max_relative_norm": math.nan}, {"max_relative_norm": math.inf},
        {"number": -1}, {"number": 1.0}, {"number": True}, {"number": "3"}, {"number": None},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_or_of_another_type_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(PolicyError, match=next(iter(values))) as told:
        Policy.from_mapping(values)
    assert len(str(told.value)) < 200, "values are not echoed at any length"


def test_an_unknown_key_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(PolicyError, match=r"\['treshold'\] are not valid fields .*'threshold'"):
        Policy.from_mapping({"treshold": 0.3})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"number": 5}, "`number` has no effect with `select` 'all'"),
        ({"method": "safe-lora", "number": 5}, "`number` has no effect with `select` 'threshold'"),
        ({"select": "all", "threshold": 0.2}, "`threshold` has no effect with `select` 'all'"),
        (
            {"method": "safe-lora", "energy": 0.5},
            "`energy` has no effect with `method` 'safe-lora'. "
            "Set `method` to 'input-removal' or 'csulora', or leave `energy` out",
        ),
        ({"threshold": 0.5}, r"Set `select` to 'threshold' \(the default of safe-lora\), or leave"),
        ({"energy": 0.0}, "with `energy` 0 nothing is projected"),
        ({"method": "safe-lora", "select": "number", "number": 0}, "with `number` 0 nothing is projected"),
        ({"method": "safe-lora", "threshold": 0}, "with `threshold` 0 nothing is projected"),
        ({"method": "safe-lora", "threshold": -1}, "with `threshold` -1 nothing is projected"),
        (
            {"select": "none", "energy": 0.5},
            "`energy` has no effect with `select` 'none'. "
            "Set `select` to 'threshold' or 'number' or 'all', or leave `energy` out",
        ),
        ({"select": "none", "method": "safe-lora"}, "`method` has no effect with `select` 'none'"),
        ({"select": "none", "number": 3}, "`number` has no effect with `select` 'none'"),
    ],
)
def test_a_value_without_effect_is_told(values: dict[str, Any], told: str) -> None:
    with pytest.raises(PolicyError, match=told):
        Policy.from_mapping(values).check_effective(values)


def test_values_with_effect_pass() -> None:
    for values in (
        {"method": "safe-lora", "threshold": 0.4},
        {"energy": 0.3},
        {"select": "number", "number": 5},
        {"select": "none", "max_total_norm": 0.1, "opinion": True},
        *({"method": method, "energy": 0.9} for method in METHODS if method != "safe-lora"),
    ):
        Policy.from_mapping(values).check_effective(values)


def test_energy_has_an_effect_on_all_methods_but_one() -> None:
    assert {m for m in METHODS if not Policy(method=m).has_effect("energy")} == {"safe-lora"}
    assert all(Policy(method=method).has_effect("max_relative_norm") for method in METHODS)


# One field apart, as (method, select, field, the laxer value, the stricter value).
_LAXER = [
    *[
        (method, select, cap, 0.6, 0.5)
        for method in METHODS
        for select in ("threshold", "number", "all")
        for cap in ("max_relative_norm", "max_total_norm")
    ],
    *[("input-removal", select, "energy", 0.2, 0.3) for select in ("threshold", "number", "all")],
    *[(method, "threshold", "threshold", 0.3, 0.4) for method in METHODS],
    *[(method, "number", "number", 9, 10) for method in METHODS],
    *[(method, "all", "mode", "report-only", "enforce") for method in METHODS],
]


@pytest.mark.parametrize(("method", "select", "field", "laxer", "stricter"), _LAXER)
def test_one_laxer_field_makes_a_policy_less_strict(
    method: str, select: str, field: str, laxer: Any, stricter: Any
) -> None:
    """Whatever the others are: all of them equal, or each of them as strict as it can be."""
    lax, strict = (Policy(method=method, select=select, **{field: value}) for value in (laxer, stricter))
    assert strict.at_least_as_strict(lax) and not lax.at_least_as_strict(strict)
    assert lax.at_least_as_strict(lax) and strict.at_least_as_strict(strict)
    rest = {"threshold": 1.0, "number": 99, "max_relative_norm": 0.0, "max_total_norm": 0.0}
    if method == "input-removal":
        rest["energy"] = 1.0
    assert not lax.with_values({**rest, field: laxer}).at_least_as_strict(strict)


@pytest.mark.parametrize("method", METHODS)
def test_a_number_and_a_threshold_cannot_be_compared(method: str) -> None:
    number, threshold = (
        Policy(method=method, select=select, number=99, threshold=1.0) for select in ("number", "threshold")
    )
    assert not number.at_least_as_strict(threshold) and not threshold.at_least_as_strict(number)


def test_a_second_opinion_makes_a_policy_stricter() -> None:
    for policy in (Policy(), Policy(method="safe-lora"), Policy(mode="report-only")):
        with_one = policy.with_values({"opinion": True})
        assert with_one.at_least_as_strict(policy) and not policy.at_least_as_strict(with_one)
        assert policy.tightened(with_one) == with_one == with_one.tightened(policy)
        assert with_one.id != policy.id and with_one.summary == f"{policy.summary}, second opinion"
    assert not Policy(mode="report-only", opinion=True).at_least_as_strict(Policy())
    assert not Policy(energy=0.4).at_least_as_strict(Policy(mode="report-only", opinion=True))


def test_a_policy_without_a_second_opinion_is_what_older_releases_know() -> None:
    assert "opinion" not in Policy().to_mapping() and Policy(opinion=True).to_mapping()["opinion"] is True
    for policy in (Policy(), Policy(opinion=True)):
        assert Policy.from_stored(policy.to_mapping()) == policy
    with pytest.raises(PolicyError, match="`opinion` is 16: expected true or false"):
        Policy.from_mapping({"opinion": 16})


def test_every_policy_is_as_strict_as_one_that_only_reports() -> None:
    audit = Policy(mode="report-only", max_relative_norm=0.0)
    for other in (Policy(), Policy(method="safe-lora"), Policy(mode="report-only")):
        assert other.at_least_as_strict(audit)
    assert not audit.at_least_as_strict(Policy())


@pytest.mark.parametrize("method", METHODS)
def test_a_policy_is_as_strict_as_itself_and_stricter_than_a_choice_of_modules(method: str) -> None:
    everything, some = Policy(method=method, select="all"), Policy(method=method, select="number")
    assert everything.at_least_as_strict(everything) and everything.at_least_as_strict(some)
    assert not some.at_least_as_strict(everything)
    for other in set(METHODS) - {method}:
        assert not everything.at_least_as_strict(Policy(method=other, select="all"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("select", ["all", "threshold", "number"])
def test_every_policy_is_stricter_than_one_that_projects_nothing(method: str, select: str) -> None:
    """Whatever its method is. Caps and a second opinion count as ever, and what is stricter stays."""
    nothing, policy = Policy(select="none"), Policy(method=method, select=select)
    assert policy.at_least_as_strict(nothing) and not nothing.at_least_as_strict(policy)
    assert nothing.at_least_as_strict(nothing)
    assert policy.tightened(nothing) == policy == nothing.tightened(policy)
    for stricter in ({"max_total_norm": 0.5}, {"opinion": True}):
        assert not policy.at_least_as_strict(Policy(select="none", **stricter))
        assert policy.tightened(Policy(select="none", **stricter)) == policy.with_values(stricter)
    assert nothing.at_least_as_strict(Policy(mode="report-only"))
    assert not Policy(mode="report-only").at_least_as_strict(nothing), "it refuses nothing"


def test_more_energy_is_stricter_for_input_removal() -> None:
    less, more = (Policy(method="input-removal", energy=energy) for energy in (0.7, 0.9))
    assert more.at_least_as_strict(less) and not less.at_least_as_strict(more)


def test_more_energy_is_another_rule_for_csulora() -> None:
    less, more = (Policy(method="csulora", energy=energy) for energy in (0.7, 0.9))
    assert not more.at_least_as_strict(less) and not less.at_least_as_strict(more)
    assert less.at_least_as_strict(Policy(method="csulora", energy=0.7, max_relative_norm=2.0))


def test_the_id_depends_on_every_field() -> None:
    others = [
        Policy(method="safe-lora", select="all"), Policy(select="threshold"), Policy(threshold=0.4),
        Policy(number=11), Policy(energy=0.7), Policy(max_relative_norm=2.0), Policy(max_total_norm=2.0),
        Policy(mode="report-only"), Policy(opinion=True),
    ]  # fmt: skip
    assert len({policy.id for policy in (Policy(), *others)}) == 1 + len(dataclasses.fields(Policy))
    assert Policy.from_mapping(dataclasses.asdict(Policy())).id == Policy().id


@pytest.mark.parametrize(
    ("values", "summary"),
    [
        ({}, "input-removal, energy 0.2, select all"),
        ({"method": "safe-lora"}, "safe-lora, select threshold 0.35"),
        ({"method": "csulora", "select": "number", "number": 3}, "csulora, energy 0.95, select number 3"),
        ({"select": "none", "opinion": True}, "nothing projected, second opinion"),
    ],
)
def test_the_summary_has_what_decides(values: dict[str, Any], summary: str) -> None:
    assert Policy(**values).summary == summary


def test_the_fields_that_are_chosen() -> None:
    """What no dataclass can know, as far as it shows: fields whose values are not the method's own."""
    assert Policy().chosen == Policy(method="csulora", energy=0.95).chosen == Policy(energy=0.2).chosen == []
    assert Policy(method="safe-lora", select="all").chosen == ["select"]
    assert Policy(method="csulora", energy=0.2, max_total_norm=0.5).chosen == ["energy", "max_total_norm"]
    assert Policy(threshold=0.5, number=3, mode="report-only").chosen == ["threshold", "number", "mode"]


def test_the_methods_that_select_so_by_themselves_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "other", dataclasses.replace(METHODS["safe-lora"], name="other"))
    with pytest.raises(PolicyError) as told:
        Policy(threshold=0.5).check_effective(["threshold"])
    assert str(told.value) == (
        "`threshold` has no effect with `select` 'all'. Set `select` to 'threshold' (the default of "
        "safe-lora and other), or leave `threshold` out"
    )


def test_a_stored_policy_without_a_former_word_is_read_as_it_is() -> None:
    for values in ({"energy": 0.5}, {"energy": 0.5, "mode": "enforce"}, {"mode": ["audit"]}):
        assert stored_values(values) == values


def test_a_mode_s_former_name_is_read_where_it_was_stored_and_refused_where_it_is_typed() -> None:
    with pytest.raises(PolicyError, match="use 'report-only'"):
        Policy.from_mapping({"mode": "audit"})
    stored = {"mode": "audit", "energy": 0.5}
    assert Policy.from_stored(stored) == Policy(mode="report-only", energy=0.5)
    assert stored["mode"] == "audit"
    for values in ({"mode": "off"}, {"mode": ["audit"]}):
        with pytest.raises(PolicyError, match="expected one of enforce, report-only"):
            Policy.from_stored(values)


def test_ids_are_those_of_older_releases() -> None:
    """Published copies are addressed by them: another id would project every stored adapter again."""
    assert Policy().id == "8a0b90257a6bee12eb620d291d7b6d4d694eb47f73d96503c5e96872ad50946c"
    assert Policy(mode="report-only").id == "296f6007680b2423313824cecab66058bc551f28df20e5e38a297a730994fb41"


def test_equal_policies_have_one_id() -> None:
    assert Policy(threshold=1, max_relative_norm=2) == Policy(threshold=1.0, max_relative_norm=2.0)
    assert Policy(threshold=1, max_relative_norm=2).id == Policy(threshold=1.0, max_relative_norm=2.0).id
    assert Policy(energy=0.0).id == Policy(energy=-0.0).id == Policy(energy=0).id


def selected(policy: Policy, similarities: Mapping[str, float | None]) -> frozenset[str]:
    """By similarities that are known exactly: none of the selected modules is uncertain."""
    known = {name: None if value is None else Interval.exact(value) for name, value in similarities.items()}
    found = policy.selects(known)
    assert not found.uncertain
    return found.projected


@given(_SIMILARITIES, st.floats(-1, 1))
def test_threshold_takes_what_is_not_above_it(similarities: dict[str, float | None], tau: float) -> None:
    chosen = selected(Policy(method="safe-lora", threshold=tau), similarities)
    assert chosen == {n for n in similarities if similarities[n] is not None and similarities[n] <= tau}


@given(_SIMILARITIES, st.integers(0, 25))
def test_number_takes_the_least_similar(similarities: dict[str, float | None], number: int) -> None:
    chosen = selected(Policy(method="safe-lora", select="number", number=number), similarities)
    known = {n: s for n, s in similarities.items() if s is not None}
    assert chosen <= set(known) and len(chosen) == min(number, len(known))
    rest = [s for n, s in known.items() if n not in chosen]
    assert not chosen or not rest or max(known[n] for n in chosen) <= min(rest)


def test_equal_similarities_are_taken_in_the_order_of_names() -> None:
    policy = Policy(method="safe-lora", select="number", number=2)
    assert selected(policy, {"c": 0.5, "a": 0.5, "b": 0.5}) == {"a", "b"}
    assert selected(policy, {"b": 0.5, "a": 0.5, "c": 0.5}) == {"a", "b"}


def test_a_similarity_that_is_not_a_number_is_below_every_threshold() -> None:
    policy = Policy(method="safe-lora", threshold=-1)
    given = {"a": Interval.exact(math.nan), "b": Interval.exact(1.0), "c": None}
    assert policy.selects(given).projected == {"a"}


def test_the_paper_projects_at_equality() -> None:
    policy = Policy(method="safe-lora", threshold=0.5)
    assert selected(policy, {"a": 0.5, "b": math.nextafter(0.5, 1)}) == {"a"}


@pytest.mark.parametrize(
    ("own", "kept", "result"),
    [
        # Of one method: the stricter value of each field.
        (
            {"energy": 0.6},
            {"energy": 0.5, "max_relative_norm": 0.1},
            {"energy": 0.6, "max_relative_norm": 0.1},
        ),
        ({"energy": 0.2}, {"energy": 0.5, "max_relative_norm": 2.0}, {"energy": 0.5}),
        ({"select": "number"}, {"select": "all"}, {}),
        ({"select": "number"}, {"select": "number", "number": 90}, {"select": "number", "number": 90}),
        # Another method's fields mean something else.
        ({}, {"method": "safe-lora", "select": "all", "max_relative_norm": 0.5}, {"max_relative_norm": 0.5}),
        # A number and a threshold may choose other modules; all of them is as strict as both.
        ({"select": "number"}, {"select": "threshold", "threshold": 0.9}, {"select": "all"}),
        ({"select": "threshold"}, {"select": "number"}, {"select": "all"}),
        ({"select": "all"}, {"select": "threshold"}, {"select": "all"}),
        # CSULoRA's energies cannot be compared.
        ({"method": "csulora"}, {"method": "csulora", "energy": 0.5}, {"method": "csulora"}),
        (
            {"method": "csulora", "energy": 0.5}, {"method": "csulora"}, {"method": "csulora", "energy": 0.5},
        ),
        # It enforces, whatever the other does.
        ({}, {"mode": "report-only", "max_relative_norm": 0.5}, {"max_relative_norm": 0.5}),
    ],
)  # fmt: skip
def test_what_is_stricter_stays(own: dict[str, Any], kept: dict[str, Any], result: dict[str, Any]) -> None:
    tightened = Policy(**own).tightened(Policy(**kept))
    assert tightened == Policy(**result)
    assert tightened.at_least_as_strict(Policy(**own))


@pytest.mark.parametrize(
    ("select", "field", "stricter", "laxer"),
    [
        ("all", "energy", 0.5, 0.3), ("threshold", "threshold", 0.9, 0.4), ("number", "number", 9, 2),
        ("all", "max_relative_norm", 0.4, 0.5), ("all", "max_total_norm", 0.4, 0.5),
    ],
)  # fmt: skip
def test_the_stricter_value_stays_whichever_side_has_it(
    select: str, field: str, stricter: Any, laxer: Any
) -> None:
    strict, lax = (Policy(select=select, **{field: value}) for value in (stricter, laxer))
    assert strict.tightened(lax) == lax.tightened(strict) == strict


@pytest.mark.parametrize("values", [None, [], 5, "energy", [["energy", 0.2]]], ids=repr)
def test_a_policy_is_an_object(values: Any) -> None:
    with pytest.raises(PolicyError, match="expected an object"):
        Policy.from_mapping(values)


def test_none_selects_nothing() -> None:
    assert Policy(select="none").selects({"a": (0.0, 0.0), "b": None}).projected == frozenset()
    assert Policy(select="none").selects_none and not Policy(select="number").selects_none
