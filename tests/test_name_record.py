"""A record's file: what is wrong with it, in a sentence, and the names that have none."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from safelora_vllm.errors import UsageError
from safelora_vllm.store import AdapterRecord, Version
from safelora_vllm.store.name_record import file_of, from_json, to_json

RECORD = AdapterRecord("x").with_version(Version(0, "a" * 64, bytes=10, rank=4, created=2.5, by="acme/ci"))


def text(record: dict[str, Any] | None = None, **changes: Any) -> bytes:
    """A sound record's file with other fields of the record or of its version."""
    data = json.loads(to_json(RECORD, "x.json")) | (record or {})
    data["versions"] = [version | changes for version in data["versions"]]
    return json.dumps(data).encode()


FAULTS = {
    "its format is 2, this safelora reads 1": text({"format": 2}),
    "rank is '4'": text(rank="4"),
    "ruleset_digest is 7": text(rules=7),
    f"digest is '{'A' * 64}'": text(digest="A" * 64),
    "its current version is 1, of [2]": text(version=2),
    "its current version is 2, of [1]": text({"current": 2}),
    f"its current version is '{'1' * 99}, of [1]": text({"current": "1" * 200}),
    "its versions are []": text({"versions": []}),
    "it is the record of 'y'": text({"name": "y"}),
    "it is the record of 1": text({"name": 1}),
    "NaN is not a number": text(created=math.nan),
    "-Infinity is not a number": text(load_seconds=-math.inf),
}


@pytest.mark.parametrize("told", FAULTS)
def test_what_is_wrong_with_a_record_is_told(told: str) -> None:
    with pytest.raises(ValueError) as wrong:
        from_json(FAULTS[told], "x.json")
    assert str(wrong.value) == told


def test_an_override_is_for_its_own_content_and_leaves_the_policy_before_it() -> None:
    lax, strict = {"mode": "report-only"}, {"max_relative_norm": 0.5}
    overridden = dataclasses.replace(RECORD.live, policy=lax, override=True, base_policy=strict)
    assert overridden.next_policy == strict
    assert dataclasses.replace(overridden, base_policy={}).next_policy == {}
    assert dataclasses.replace(RECORD.live, policy=strict, base_policy=lax).next_policy == strict


@pytest.mark.parametrize("field", ["created", "load_seconds"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_written(field: str, value: float) -> None:
    record = AdapterRecord("x").with_version(dataclasses.replace(RECORD.live, **{field: value}))
    with pytest.raises(ValueError, match="is not a number"):
        to_json(record, "x.json")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("%FF.json", "\ufffd"),
        ("\udcff.json", "\udcff"),
        ("%zz.json", "%zz"),
        ("a b.json", "a b"),
        ("%61.json", "a"),
    ],
    ids=ascii,
)
def test_one_name_has_one_file(file: str, name: str) -> None:
    """Another way to quote it does not make a second record of a name."""
    with pytest.raises((ValueError, UsageError), match=r"it is the record of|expected Unicode text"):
        from_json(text({"name": name}), file)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("", "'' is not a valid adapter name: it takes 5 bytes as a file name"),
        ("x" * 251, f"'{'x' * 99} is not a valid adapter name: it takes 256 bytes as a file name"),
        ("é" * 45, f"'{'é' * 45}' is not a valid adapter name: it takes 275 bytes as a file name"),
    ],
    ids=ascii,
)
def test_a_name_without_a_file_is_told_with_what_would_fit(name: str, told: str) -> None:
    with pytest.raises(UsageError) as refused:
        file_of(name)
    assert str(refused.value) == f"{told}; give one of 1 to about 250 letters and digits"
    assert file_of("x" * 250) == "x" * 250 + ".json"
