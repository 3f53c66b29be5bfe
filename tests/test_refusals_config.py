"""What patterns mean, and configs that must pass. Those that must not: tests/corpus."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from safelora_vllm.adapters.config import parse_config
from safelora_vllm.adapters.read import Limits
from safelora_vllm.gate.admit import GateSettings
from safelora_vllm.store import PublishedStore
from tests.refusing import codes, judge
from tests.tiny import Draft, lora_config

_HUGE = 10**400


def test_the_worst_patterns_that_are_accepted_are_matched_quickly() -> None:
    patterns = {f"{'a.' * 50}{number}$": 3 for number in range(4096)}
    config = lora_config(rank_pattern=patterns, alpha_pattern=patterns)
    assert 0.8 < len(json.dumps(config)) / Limits().config_bytes < 1
    modules = [f"{'a.' * 100}{number}" for number in range(699)] + ["b"]
    start = time.process_time()  # not the clock: the machine may be busy
    meaning, reasons = parse_config(config)
    assert meaning is not None and not reasons
    found = [(meaning.rank(module), meaning.scale(module)) for module in modules]
    # 0.06 s. Each pattern beside each module would be 8.6 million comparisons, over 4 s.
    assert time.process_time() - start < 1.0
    assert found == [(3, 1.0)] * 699 + [(4, 2.0)]


@pytest.mark.parametrize("name", ["rank_pattern", "alpha_pattern"])
def test_too_many_patterns(name: str, tmp_path: Path, gate: GateSettings, store: PublishedStore) -> None:
    patterns = {f"a{number}": 4 for number in range(4096)}
    assert judge(Draft(config=lora_config(**{name: patterns})).write(tmp_path / "a"), gate, store).key
    patterns["one-more"] = 4
    folder = Draft(config=lora_config(**{name: patterns})).write(tmp_path / "b")
    assert codes(judge(folder, gate, PublishedStore(tmp_path / "empty"))) == {"pattern"}


_NAMES = st.text("ab1_.-", min_size=1, max_size=8)


@given(
    st.dictionaries(st.tuples(st.booleans(), _NAMES, st.booleans()), st.integers(1, 99), max_size=4), _NAMES
)
def test_plain_patterns_mean_what_they_mean_to_peft(
    drawn: dict[tuple[bool, str, bool], int], module: str
) -> None:
    patterns = {"^" * start + name + "$" * end: value for (start, name, end), value in drawn.items()}
    meaning, reasons = parse_config(lora_config(rank_pattern=patterns, alpha_pattern=patterns))
    assert meaning is not None and not reasons
    # To PEFT a dot is any character: what is meant here is a dot.
    to_peft = {pattern.replace(".", r"\."): value for pattern, value in patterns.items()}
    found = get_pattern_key(list(to_peft), module)
    assert meaning.rank(module) == to_peft.get(found, 4)
    assert meaning.scale(module) * meaning.rank(module) == pytest.approx(to_peft.get(found, 8))


@pytest.mark.parametrize("module", ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "q_proj"])
@pytest.mark.parametrize(
    "order",
    [
        ["q_proj", "self_attn.q_proj", "^layers.0.self_attn.q_proj$"],
        ["^layers.0.self_attn.q_proj$", "self_attn.q_proj", "q_proj"],
        ["self_attn.q_proj$", "q_proj$", "layers.0.self_attn.q_proj"],
        ["q_proj", "self_attn.q_proj", "q_proj$"],  # one of them twice
        ["q_proj$", "self_attn.q_proj", "q_proj"],
    ],
    ids=",".join,
)
def test_of_several_patterns_the_first_counts_not_the_longest(order: list[str], module: str) -> None:
    patterns = {pattern: 10 + place for place, pattern in enumerate(order)}
    meaning, _ = parse_config(lora_config(rank_pattern=patterns, alpha_pattern=patterns))
    expected = patterns[get_pattern_key(order, module)]  # as PEFT has it
    assert meaning is not None and meaning.rank(module) == expected
    assert meaning.scale(module) == 1.0, "its alpha is found as its rank is"


def test_a_dot_in_a_pattern_is_a_dot() -> None:
    meaning, _ = parse_config(lora_config(rank_pattern={"v1.5": 9}))
    assert meaning is not None
    assert [meaning.rank(module) for module in ("v1.5", "a.v1.5", "v1x5", "a.v1x5")] == [9, 9, 4, 4]


def test_every_default_of_the_installed_peft_is_accepted(
    tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    plain = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    saved = json.loads(json.dumps(plain.to_dict(), default=list))
    assert len(saved) > 30
    assert judge(Draft(config=saved).write(tmp_path / "a"), gate, store).report.accepted


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "gaussian"}, {"init_lora_weights": False}, {"init_lora_weights": None},
        {"lora_alpha": 7.5}, {"lora_dropout": 0.1}, {"inference_mode": True}, {"revision": "main"},
        {"layers_to_transform": [0]}, {"bias": None},
        {"use_rslora": None}, {"rank_pattern": None, "alpha_pattern": None}, {"some_future_flag": False},
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_nothing_is_accepted_and_not_passed_on(
    changes: dict[str, Any], tmp_path: Path, gate: GateSettings, store: PublishedStore
) -> None:
    admission = judge(Draft(config=lora_config(**changes)).write(tmp_path / "a"), gate, store)
    assert admission.report.accepted and admission.folder is not None
    assert list(json.loads((admission.folder / "adapter_config.json").read_text())) == [
        "peft_type", "r", "lora_alpha", "target_modules", "bias", "task_type", "base_model_name_or_path",
    ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(LoraConfig(r=4).to_dict()))
def test_no_value_of_a_known_key_breaks_the_parser(name: str) -> None:
    odd: list[Any] = [None, True, 0, -1, 2.5, "", "x", [], [1], [[]], {}, {"a": 1}, {"a": {}}, _HUGE]
    parse: Callable[[dict[str, Any]], Any] = parse_config
    for value in odd:
        meaning, reasons = parse(lora_config(**{name: value}))
        assert (meaning is None) == bool(reasons)
        if meaning is not None:
            meaning.rank("a"), meaning.scale("a")
