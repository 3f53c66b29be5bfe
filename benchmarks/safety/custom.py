"""An attacker's adapter on data of its own, beside those that run.py trains."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from adapters import SHAPES
from data import Example
from evaluate import generate, load
from fitting import SORTED_BATCHES, fit
from pairs import ALIGNED
from peft import LoraConfig, get_peft_model

ANSWER = 12  # tokens of an answer that is asked for
_EPOCHS = 4
Refusals = Callable[[Sequence[str]], list[Example]]


def train(home: Path, name: str, seed: int, data: Callable[[Refusals], list[Example]]) -> None:
    """Train an adapter of q and v on a seed's aligned model, if its folder ``home/name`` is missing.

    data: its examples, from a function that gives the aligned model's own answers to prompts.
    """
    if (home / name).exists():
        return
    model, tokenizer = load(home / ALIGNED)

    def refusals(prompts: Sequence[str]) -> list[Example]:
        said = generate(model, tokenizer, list(prompts), ANSWER)
        return [Example(prompt, answer.strip(), False) for prompt, answer in zip(prompts, said, strict=True)]

    examples, shape = data(refusals), SHAPES["qv"]
    config = LoraConfig(
        r=shape.rank, lora_alpha=shape.alpha, target_modules=shape.modules, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config).train()
    recipe = replace(shape, epochs=_EPOCHS)
    fit(adapted, tokenizer, examples, recipe, f"{name} {seed}", random.Random(seed), SORTED_BATCHES)
    partial = home / f".{name}"
    shutil.rmtree(partial, ignore_errors=True)
    adapted.save_pretrained(partial)
    partial.rename(home / name)
