"""What a config is told, key by key, and the values at the bounds of what passes. No gate, no files."""

from __future__ import annotations

import math
from typing import Any

import pytest

from safelora_vllm.adapters.config import parse_config
from safelora_vllm.errors import Reason
from tests.tiny import lora_config

LARGEST = 2**31 - 1
OVER = 10**400  # more than a float holds
TYPE = "config_type"
SET = "{} is set, which this gate cannot project; train without it"
BASE = (
    "init_lora_weights is {}, which changes the base weights; convert the adapter with PEFT's "
    "path_initial_model_for_weight_conversion"
)
KEYS = "set in the config, but not known to this gate; remove it, or train without it"
NAMES = "not a valid name in {}: expected plain module names and suffixes"
OBJECT = "{} is not an object of module names and numbers"
VALUES = "{} has values that are not numbers above 0"
RANK, ALPHA = "r is {}: expected a whole number above 0", "lora_alpha is {}: expected a number above 0"
TARGETS = "target_modules is not valid: expected a string or a list of strings"
MANY = "{} has 4,097 patterns, allowed are 4,096; write suffixes that several modules share"
PATTERNS = ("rank_pattern", "alpha_pattern")

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"peft_type": "IA3"}, "peft_type", "peft_type is 'IA3': expected 'LORA'"),
    ({"peft_type": None}, "peft_type", "peft_type is None: expected 'LORA'"),
    *[
        ({key: True}, code, SET.format(key))
        for key, code in {
            "use_dora": "dora", "modules_to_save": "modules_to_save", "lora_bias": "bias",
            "layer_replication": "layer_replication", "alora_invocation_tokens": "alora",
            "trainable_token_indices": "trainable_tokens", "target_parameters": "target_parameters",
            "fan_in_fan_out": "fan_in_fan_out", "loftq_config": "init", "use_qalora": "qalora",
            "use_bdlora": "bdlora",
        }.items()
    ],
    ({"bias": "all"}, "bias", "bias is 'all'; train with bias='none'"),
    ({"bias": False}, "bias", "bias is False; train with bias='none'"),
    ({"init_lora_weights": "pissa"}, "init", BASE.format("'pissa'")),
    ({"init_lora_weights": 1}, "init", BASE.format("1")),
    ({"init_lora_weights": ["eva"]}, "init", BASE.format("['eva']")),
    ({"b": 1, "a": [0], "c": 0}, "unknown_config", f"'a', 'b': {KEYS}"),
    ({"target_modules": 7}, TYPE, TARGETS),
    ({"target_modules": ["q_proj", 7]}, TYPE, TARGETS),
    ({"target_modules": {"q_proj": 1}}, TYPE, TARGETS),
    *[({"r": value}, TYPE, RANK.format(value)) for value in (0, -1, 2**31, 4.0, True, None)],
    *[({"lora_alpha": value}, TYPE, ALPHA.format(value)) for value in (0, 0.0, -1, True, None)],
    *[({"lora_alpha": value}, TYPE, ALPHA.format(value)) for value in (math.inf, math.nan)],
    ({"lora_alpha": OVER}, TYPE, ALPHA.format(str(OVER)[:80])),
    ({"lora_alpha": "8"}, TYPE, ALPHA.format("'8'")),
    ({"use_rslora": 1}, TYPE, "use_rslora is 1: expected true or false"),
    *[({key: value}, TYPE, OBJECT.format(key)) for key in PATTERNS for value in ([], 0, False, "", ["q"], 5)],
    *[({key: {"q": value}}, TYPE, VALUES.format(key)) for key in PATTERNS for value in (0, -1, True, None)],
    ({"rank_pattern": {"q": 2, "k": 2**31}}, TYPE, VALUES.format("rank_pattern")),
    ({"rank_pattern": {"q": 2.5}}, TYPE, VALUES.format("rank_pattern")),
    *[({key: dict.fromkeys(map(str, range(4097)), 1)}, "pattern", MANY.format(key)) for key in PATTERNS],
    *[
        ({key: {name: 1, "k": 1}}, "pattern", f"{name!r}: {NAMES.format(key)}")
        for key in PATTERNS
        for name in ("", "^", "$", ".*", "a|b", "^^q", "q$$", "q^", "$q", "ä", "q\n")
    ],
    ({"rank_pattern": {"q" * 513: 1}}, "pattern", f"'{'q' * 89}: {NAMES.format('rank_pattern')}"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "code", "message"), WRONG, ids=range(len(WRONG)))
def test_each_fault_has_its_code_and_its_sentence(changes: dict[str, Any], code: str, message: str) -> None:
    assert parse_config(lora_config(**changes)) == (None, [Reason(code, message)])


def test_faults_are_all_told() -> None:
    changes = {"use_dora": 1, "r": 0, "rank_pattern": {"*": 0}, "alpha_pattern": {"*": 1}, "new": 1}
    meaning, reasons = parse_config(lora_config(**changes))
    assert meaning is None
    assert [reason.code for reason in reasons] == [
        "dora", "unknown_config", TYPE, "pattern", TYPE, "pattern",
    ]  # fmt: skip


INERT = (
    "auto_mapping base_model_name_or_path corda_config eva_config exclude_modules inference_mode "
    "layers_pattern layers_to_transform lora_dropout lora_ga_config megatron_core peft_version "
    "qalora_group_size revision runtime_config task_type"
)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 1}, {"r": LARGEST}, {"lora_alpha": 5e-324}, {"lora_alpha": 1.5}, {"lora_alpha": LARGEST + 1},
        {"bias": "none"}, {"bias": None}, {"use_rslora": None}, {"use_rslora": False},
        *[
            {"init_lora_weights": init}
            for init in (None, True, False, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
        ],
        {"target_modules": None}, {"target_modules": "all-linear"}, {"target_modules": []},
        {"target_modules": ["q_proj"]}, {"new": 0, "newer": [], "newest": None},
        {"use_dora": False, "modules_to_save": [], "loftq_config": {}},
        dict.fromkeys(INERT.split(), "x"),
        *[{key: value} for key in PATTERNS for value in (None, {}, dict.fromkeys(map(str, range(4096)), 1))],
        {"rank_pattern": {"q": LARGEST}}, {"alpha_pattern": {"q": 0.5}}, {"rank_pattern": {"^a.b-c_d$": 1}},
        {"rank_pattern": {"q" * 512: 1}},
    ],
    ids=lambda changes: str(changes)[:40],
)  # fmt: skip
def test_the_values_that_pass(changes: dict[str, Any]) -> None:
    meaning, reasons = parse_config(lora_config(**changes))
    assert reasons == [] and meaning is not None
    assert (meaning.r, meaning.alpha) == (changes.get("r", 4), changes.get("lora_alpha", 8))
    assert meaning.rslora is False and meaning.scale("other") == meaning.alpha / meaning.r


def test_what_a_config_may_leave_out() -> None:
    meaning, reasons = parse_config({"peft_type": "LORA", "r": 4, "lora_alpha": 8})
    assert reasons == [] and meaning is not None
    assert (meaning.rank("q"), meaning.scale("q"), meaning.rslora) == (4, 2.0, False)
    assert parse_config({}) == (
        None,
        [
            Reason("peft_type", "peft_type is None: expected 'LORA'"),
            Reason(TYPE, RANK.format(None)),
            Reason(TYPE, ALPHA.format(None)),
        ],
    )


@pytest.mark.parametrize("key", PATTERNS)
@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"b.q": 9}, {"a.b.q": 9, "b.q": 9, "ab.q": 4, "q": 4, "a.b.q.c": 4}),
        ({"^b.q": 9}, {"b.q": 9, "a.b.q": 4}),
        ({"q$": 9}, {"q": 9, "a.q": 9, "qq": 4}),
        ({"q": 9, "b.q": 6}, {"a.b.q": 9}),
        ({"b.q": 6, "q": 9}, {"a.b.q": 6, "a.q": 9}),
        ({"q$": 6, "q": 9}, {"q": 6}),
    ],
)
def test_the_first_pattern_that_ends_a_name_counts(
    key: str, patterns: dict[str, int], expected: dict[str, int]
) -> None:
    meaning, _ = parse_config(lora_config(lora_alpha=4, **{key: patterns}))
    assert meaning is not None
    for module, value in expected.items():
        rank, alpha = (value, 4) if key == "rank_pattern" else (4, value)
        assert meaning.rank(module) == rank and type(meaning.rank(module)) is int
        assert meaning.scale(module) == alpha / rank


def test_the_scale_of_rslora_is_alpha_over_the_root_of_the_rank() -> None:
    meaning, _ = parse_config(
        lora_config(use_rslora=True, rank_pattern={"k": 9}, alpha_pattern={"k": 6, "v": 1})
    )
    assert meaning is not None and meaning.rslora is True
    assert [meaning.scale(module) for module in "qkv"] == [4.0, 2.0, 0.5]
