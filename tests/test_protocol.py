"""What crosses between a gate and its callers: every message and every error arrives as it was sent."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

import pytest

import safelora_vllm
from safelora_vllm import errors
from safelora_vllm.errors import AdapterRefused, GateUnavailable, MalformedMessage, Reason, SafeLoRAError
from safelora_vllm.gate.protocol import (
    ERRORS,
    Admit,
    Answer,
    Call,
    Ensure,
    Failure,
    GateConfig,
    GateState,
    GetMetrics,
    GetState,
    Judgement,
    Metrics,
    decode_answer,
    decode_call,
    decode_config,
    encode,
)
from safelora_vllm.methods import METHODS
from safelora_vllm.policy import Policy
from safelora_vllm.report import ModuleReport, Report
from safelora_vllm.settings import ServerSettings
from safelora_vllm.tenants.quotas import Allowance

REASONS = [Reason("dora", "DoRA: not \x00 supported"), Reason("bias", "ü" * 600), Reason("dora", "again")]
MODULES = [
    ModuleReport("a.q_proj", 4, 0.1 + 0.2, 1 / 3, 1e-300, 5e-324, "projected"),
    ModuleReport("b.v_proj", 0, None, 0.5, None, 0.0, "kept"),
]
POLICY = Policy("csulora", "number", 0.1, 7, 1.0, 1e300, 2.0, "report-only")
ACCEPTED = Report("acme/x", "d" * 64, "p" * 64, POLICY, True, REASONS[:1], MODULES, 1.7976931348623157e308)
REFUSED = dataclasses.replace(ACCEPTED, accepted=False, reasons=REASONS, modules=[], total_norm=0.0)
CALLS: list[Call] = [
    Admit("/a", "acme/x"),
    Admit("/ü\n", "x", {"energy": 0.5}, True, False, Allowance(-1, ["d" * 64], 8)),
    Ensure("d" * 64, "x"),
    Ensure("d" * 64, "x", dataclasses.asdict(POLICY), override=True),
    GetMetrics(),
    GetState(),
]
ANSWERS: list[Any] = [
    Judgement(ACCEPTED, "k" * 64, 10, "r" * 64),
    Judgement(REFUSED, None, 0, "r" * 64),
    Metrics("# HELP x\nx 1\n"),
    *(GateState("p", Policy(method), "r", "/store", 1, 0.25) for method in METHODS),
]
STATE = encode(ANSWERS[-1])


@pytest.mark.parametrize("call", CALLS, ids=lambda call: type(call).__name__)
def test_a_call_arrives_as_it_was_made(call: Call) -> None:
    line = encode(call)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert decode_call(line) == call


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: type(answer).__name__)
def test_an_answer_arrives_as_it_was_given(answer: Answer) -> None:
    line = encode(answer)
    assert line.count(b"\n") == 1
    found = decode_answer(line, type(answer))
    assert found == answer and type(found) is type(answer)


def test_a_configuration_arrives_with_all_settings() -> None:
    settings = ServerSettings(
        "p", "s", {"energy": 0.5}, True, "cpu", 1, 5, 2, 3, "k", ["a"], ["s3://bbb"],
        ["http://c:9"], "s3://ddd", 4,
        allow_hub=True, admin_socket="/e", private_docs=True, no_page=True, route_access={"GET /x": "users"},
        tenant_reports="summary", audit_stdout=True, exam="enforce", exam_threshold=0.5, ladder="safe-lora",
        exam_probes="/p", exam_every="24h", exam_languages="de", second_opinion=16,
    )  # fmt: skip
    assert not [f for f in dataclasses.fields(settings) if getattr(settings, f.name) == f.default]
    for config in (
        GateConfig("x", "m", settings, "cuda:0", "bfloat16", 8, ("q_proj", "o_proj"), 0),
        GateConfig("x", "m", settings),
    ):
        assert decode_config(encode(config)) == config
    with pytest.raises(MalformedMessage, match=r"is not a valid configuration of a gate: .*`settings`"):
        decode_config(b'{"socket": "x", "model": "m"}\n')


def raised(kind: type[SafeLoRAError]) -> SafeLoRAError:
    """An error of this class, with all that it may carry."""
    return AdapterRefused(REASONS) if kind is AdapterRefused else kind(f"a {kind.__name__} of ours: ü \n")


@pytest.mark.parametrize("kind", ERRORS.values(), ids=ERRORS)
def test_an_error_arrives_as_the_same_class_with_the_same_fields(kind: type[SafeLoRAError]) -> None:
    error = raised(kind)
    with pytest.raises(SafeLoRAError) as found:
        decode_answer(encode(Failure.of(error)), GateState)
    assert type(found.value) is kind
    assert str(found.value) == str(error) and found.value.args == error.args
    assert vars(found.value) == vars(error)


def test_every_error_that_a_gate_may_raise_is_registered() -> None:
    """All but those of vLLM's side, of downloads and of commands, which a gate does not load."""
    for module in pkgutil.walk_packages(safelora_vllm.__path__, "safelora_vllm."):
        if not module.name.startswith("safelora_vllm.integration"):
            importlib.import_module(module.name)
    found, todo = set(), [SafeLoRAError]
    while todo:
        found.add(kind := todo.pop())
        todo += kind.__subclasses__()
    others = ("safelora_vllm.integration", "safelora_vllm.remote", "safelora_vllm.cli", "tests")
    below = {kind for kind in found if not kind.__module__.startswith(others)}
    assert set(ERRORS.values()) == below
    assert all(getattr(errors, name) is kind for name, kind in ERRORS.items())


def test_an_error_that_is_not_ours_is_the_gates_own() -> None:
    class Forbidden(SafeLoRAError):
        """Another class of a known name."""

    for error in (ValueError("bad"), Forbidden("bad"), AttributeError("bad")):
        with pytest.raises(GateUnavailable, match=f"^{type(error).__name__}: bad$"):
            decode_answer(encode(Failure.of(error)), GateState)


def test_an_error_about_a_file_whose_name_is_not_unicode() -> None:
    with pytest.raises(errors.UsageError, match=r"there is no /\\udcff"):
        decode_answer(encode(Failure.of(errors.UsageError("there is no /\udcff"))), GateState)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"", "truncated"), (b"null", "got `null`"), (b"[]", "got `array`"), (b"{}", "`type`"),
        (b'"state"', "got `str`"), (b"{" * 100_000, "malformed"),
        (b'{"type":"exec"}', "Invalid value 'exec'"),
        (STATE.replace(b'"pid":1', b'"pid":"1"'), r"Expected `int`, got `str` - at `\$.pid`"),
        (STATE.replace(b'"pid":1,', b""), "missing required field `pid`"),
        (STATE.replace(b'"pid"', b'"more":1,"pid"'), "unknown field `more`"),
        (STATE.replace(b"0.25", b"null"), r"at `\$.busy_seconds`"),
        (STATE.replace(b'"csulora"', b'"none"'), "`method` is 'none'"),
        (STATE[:-10], "truncated"), (STATE + b"{}", "trailing"),
        (encode(Metrics("")), "Metrics is not a valid answer of a gate: expected GateState"),
        (b'{"type":"error","kind":"AdapterRefused","message":"x"}', "a refusal has reasons"),
        (b'{"type":"error","kind":"GuardError","message":"x","reasons":[{}]}', "reasons"),
        (b'{"type":"error","kind":"SystemExit","message":"x"}', "'SystemExit' is not a valid error"),
        (encode(ANSWERS[0]).replace(b'"accepted":true', b'"accepted":false'), "an accepted adapter"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_named(line: bytes, found: str) -> None:
    with pytest.raises(MalformedMessage, match=found) as error:
        decode_answer(line, GateState)
    assert "is not a valid" in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"\xff\xfe", "malformed"), (b'{"type":"__init__"}', "Invalid value '__init__'"),
        (b'{"type":"admit","path":"/a"}', "`name`"), (b'{"type":"admit","path":5,"name":"x"}', "got `int`"),
        (b'{"type":"state","nothing":1}', "unknown field `nothing`"),
        (b'{"type":"admit","path":"/","name":"x","policy":{"a":' + b"[" * 100_000, "recursion"),
        (b'{"type":"ensure","digest":"d","name":"x","override":1}', "Expected `bool`, got `int`"),
        (b'{"type":"admit","path":"/","name":"x","allowance":{"bytes":"5"}}', r"at `\$.allowance.bytes`"),
    ],
)  # fmt: skip
def test_a_call_that_is_none_is_named(line: bytes, found: str) -> None:
    with pytest.raises(MalformedMessage, match=f"is not a valid call of a gate: .*{found}"):
        decode_call(line)


def test_a_call_that_cannot_be_written_is_named() -> None:
    with pytest.raises(MalformedMessage, match="cannot be sent") as told:
        encode(Admit("/\udcff" + "x" * 1000, "x"))
    assert len(str(told.value)) < 400, "it goes into logs"


def test_an_unknown_kind_of_error_is_named_in_short() -> None:
    line = encode(Failure("x" * 1000, "why"))
    with pytest.raises(MalformedMessage, match=r"is not a valid error of a gate \(why\)") as told:
        decode_answer(line, GateState)
    assert len(str(told.value)) < 200


def test_a_number_that_json_does_not_have_does_not_pass_for_another() -> None:
    endless = dataclasses.replace(ACCEPTED, total_norm=float("inf"))
    with pytest.raises(MalformedMessage, match="total_norm"):
        decode_answer(encode(Judgement(endless, "k", 1, "r")), Judgement)
