"""The training loop of the examples: a run that was stopped goes on to the same weights."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "training"))

import fitting
from data import Example

EXAMPLES = [Example(f"ask {i}", f"say {i * 7}") for i in range(8)]
RECIPE = fitting.Recipe("base", ["q_proj"], rank=0, alpha=0, learning_rate=1e-2, epochs=2, batch=2)


class Letters:
    """A tokenizer with one token for each letter."""

    pad_token_id = 0
    eos_token_id = 1

    def apply_chat_template(self, chat: list[dict[str, str]], **_options: object) -> str:
        return "".join(turn["content"] for turn in chat) + "\n"

    def __call__(self, text: str, **_options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 62 + 2 for letter in text]}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 64}
    found = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    fitting.choose_linear_layers(found, RECIPE.modules)
    return found


def fit(learner: LlamaForCausalLM, checkpoint: Path) -> None:
    tokenizer: Any = Letters()
    fitting.fit(learner, tokenizer, EXAMPLES, RECIPE, "test", random.Random(0), 2, checkpoint)


def test_a_stopped_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_SAVE_EVERY", 0.0)
    whole = model()
    fit(whole, tmp_path / "whole")
    steps, collate = 0, fitting.collate

    def stops(*args: Any) -> dict[str, torch.Tensor]:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return collate(*args)

    monkeypatch.setattr(fitting, "collate", stops)
    with pytest.raises(KeyboardInterrupt):
        fit(model(), tmp_path / "stopped")
    resumed = model()
    fit(resumed, tmp_path / "stopped")
    assert steps == 4 + 8 - 3  # three steps were done, the fourth was stopped
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, resumed.get_parameter(name)), name
    before = model().get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert not torch.equal(before, whole.get_parameter("model.layers.0.self_attn.q_proj.weight"))
    assert list(tmp_path.iterdir()) == []
