"""Reasons quote what tenants wrote. They must not forge log lines, break JSON, or be of any length."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelora_vllm.errors import AdapterRefused, Reason, by_cause, named
from safelora_vllm.gate.admit import GateSettings
from safelora_vllm.store import PublishedStore
from tests.refusing import judge
from tests.tiny import Draft, safetensors_bytes

# The longest message: 20 reasons of 500 characters with their codes.
_MESSAGE = 20 * (500 + 30)


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain, 'quoted', \\ and größer", "plain, 'quoted', \\ and größer"),
        ("a\nINFO b\r\tc", "a\\nINFO b\\r\\tc"),
        ("\x1b[2J\x9b", "\\x1b[2J\\x9b"),
        ("\ud800 \u2028 \u202e \u200b", "\\ud800 \\u2028 \\u202e \\u200b"),
        ("\0\U000e0041", "\\x00\\U000e0041"),
        ("größer \\ ' \0", "größer \\ ' \\x00"),
        ("x" * 500, "x" * 500),
        ("x" * 501, "x" * 499 + "…"),
        ("\n" * 8_000_000, ("\\n" * 250)[:499] + "…"),
    ],
    ids=["printable", "lines", "terminal", "unicode", "other planes", "mixed", "500", "501", "millions"],
)
def test_what_is_not_printable_is_escaped_and_what_is_long_is_cut(raw: str, shown: str) -> None:
    assert Reason("shape", raw).message == shown
    assert Reason("shape", shown).message == shown  # a report that is read back says the same


@given(st.text(st.characters(exclude_categories=())))
def test_every_reason_is_one_line_of_valid_json(raw: str) -> None:
    message = Reason("shape", raw).message
    assert message.isprintable() and len(message) <= 500
    assert json.loads(json.dumps(message, ensure_ascii=False).encode()) == message


def test_a_flood_of_reasons_is_cut_but_no_code_is_lost() -> None:
    flood = [Reason(f"code{number % 3}", f"{number} " + "x" * 1000) for number in range(10_000)]
    late = [Reason(f"late{number}", "y") for number in range(200)]
    error = AdapterRefused([*flood, *flood, *late])
    assert error.codes == ["code0", "code1", "code2", *(reason.code for reason in late)]
    assert error.reasons == [*flood[:60], *late]
    assert len(str(error)) < _MESSAGE and str(error).endswith("; and 240 more")
    assert len(AdapterRefused([Reason(f"c{n % 9}", f"{n}") for n in range(10_000)]).reasons) == 100


def test_few_reasons_stay_as_they_are() -> None:
    reasons = [Reason("dora", "a"), Reason("bias", "b"), Reason("dora", "c")]
    error = AdapterRefused([*reasons, reasons[0]])
    assert error.reasons == reasons and str(error) == "[dora] a; [bias] b; [dora] c"


def test_a_cause_is_said_once_with_the_first_names() -> None:
    faults = [("shape", "q", "wide"), ("dtype", "q", "I8"), ("shape", "k", "long"), ("shape", "v", "wide")]
    assert by_cause(faults) == [
        Reason("shape", "q, v: wide"), Reason("dtype", "q: I8"), Reason("shape", "k: long"),
    ]  # fmt: skip
    assert by_cause([]) == []
    (flood,) = by_cause(("rank", f"q{number}", "too large") for number in range(5000))
    assert flood == Reason("rank", "q0, q1, q2 and 4,997 more: too large")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a"], "a"),
        (["a", "b", "c"], "a, b, c"),
        (["a", "b", "c", "d"], "a, b, c and 1 more"),
        (["x" * 90], "x" * 90),
        (["x" * 91, "y" * 1000], f"{'x' * 90}, {'y' * 90}"),
    ],
)
def test_the_names_in_a_sentence(names: list[str], shown: str) -> None:
    assert named(names) == shown


def flood_of_tensors(draft: Draft) -> bytes:
    """16,000 tensors without a value, under names of no module."""
    lines = (f'"t{n}\\u001b":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(16_000))
    assert draft.tensors
    return safetensors_bytes(b"{" + ",".join(lines).encode() + b"}")


def flood_of_keys(draft: Draft) -> None:
    """60,000 keys of no meaning in the config."""
    draft.config.update({f"k{number}\n": 1 for number in range(60_000)})


@pytest.mark.parametrize(
    ("flood", "code"), [(flood_of_tensors, "unknown_tensor"), (flood_of_keys, "unknown_config")]
)
def test_one_short_log_line_whatever_is_uploaded(
    flood: Callable[[Draft], bytes | None], code: str, tmp_path: Path, gate: GateSettings,
    store: PublishedStore, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    draft = Draft()
    weights = flood(draft)
    folder = draft.write(tmp_path / "a")
    if weights is not None:
        (folder / "adapter_model.safetensors").write_bytes(weights)
    with caplog.at_level(logging.INFO, "vllm.safelora"):
        report = judge(folder, gate, store).report
    assert [reason.code for reason in report.reasons] == [code]
    (record,) = caplog.records
    assert record.getMessage().isprintable() and len(record.getMessage()) < 700
    assert len(report.to_json()) < 2_000


def test_more_tensors_than_any_model_has(tmp_path: Path, gate: GateSettings, store: PublishedStore) -> None:
    """A header may have 8 MB: looking at 140,000 lines one by one would take seconds."""
    line = '"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    folder = Draft().write(tmp_path / "a")
    for count, code in ((16_384, "unknown_tensor"), (16_385, "weights_malformed")):
        text = ",".join(line % number for number in range(count))
        (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(b"{" + text.encode() + b"}"))
        assert {reason.code for reason in judge(folder, gate, store).report.reasons} == {code}
