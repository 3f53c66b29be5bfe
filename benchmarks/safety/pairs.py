"""The pairs of the experiment, and how the aligned model of each is made.

All pairs learn from the same prompts (examples/training/alignment.py). The answers that are not refusals are
those of SmolLM2-135M-Instruct, made once.
"""

from __future__ import annotations

import random
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "training"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import families
from alignment import Answers, Mix, training_set
from evaluate import load
from fitting import ALIGNMENT, ALL_LINEAR, SORTED_BATCHES, Recipe, choose_linear_layers, fit
from models import STORAGE_DTYPE
from peft import LoraConfig, get_peft_model
from teacher import KEPT_TOKENS
from teacher import teacher as kept_answers_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE, ALIGNED = "base", "aligned"
_TEACHER = "smollm2"
_ONCE_MORE = Recipe("base", ALL_LINEAR, rank=0, alpha=0, learning_rate=1e-4, epochs=1, batch=16)
_OTHER_SHAPES = 1000  # beyond the seeds of the first passes
_LORA = Recipe("base", ALL_LINEAR, rank=16, alpha=32, learning_rate=1e-3, epochs=2, batch=16)


@dataclass(frozen=True)
class Pair:
    """A base model and the recipe of its alignment. A rank of 0 means full fine-tuning.

    A pretrained model has longer answers to learn from than one that answers already.
    once_more: what one more pass over other shapes of questions has, with a smaller rate.
    """

    title: str
    family: str
    recipe: Recipe
    mix: Mix = field(default_factory=Mix)
    once_more: Mix | None = None


PAIRS = {
    "smollm2": Pair("SmolLM2-135M-Instruct, full fine-tuning", "smollm2", ALIGNMENT),
    # After the first passes it refuses 7 % of the harmless prompts of the choose half.
    "gemma3": Pair(
        "Gemma 3 270M pretrained, full fine-tuning",
        "gemma3",
        ALIGNMENT,
        Mix(answer_tokens=KEPT_TOKENS),
        once_more=Mix(harmful=1, harmless=2, lookalikes=1, answer_tokens=KEPT_TOKENS),
    ),
    "smollm2-lora": Pair("SmolLM2-135M-Instruct, a LoRA merged", "smollm2", _LORA),
}


def base_of(cache: Path, family: str) -> Path:
    """The folder of a family's base model, built if need be."""
    target = cache / family / BASE
    families.build(family, target)
    return target


def train_aligned(cache: Path, name: str, seed: int, target: Path, checkpoint: Path | None = None) -> None:
    """Write the aligned model of a pair to ``target``, an empty folder."""
    pair = PAIRS[name]
    base = base_of(cache, pair.family)
    model, tokenizer = load(base)
    data = training_set(pair.mix, seed, teacher(cache, pair.mix.answer_tokens))
    recipe, label = pair.recipe, f"{name} {seed}"
    if recipe.rank:
        config = LoraConfig(
            r=recipe.rank, lora_alpha=recipe.alpha, target_modules=recipe.modules, task_type="CAUSAL_LM"
        )
        learner: torch.nn.Module = get_peft_model(model, config)
    else:
        choose_linear_layers(model, recipe.modules)
        learner = model
    fit(learner.train(), tokenizer, data, recipe, label, random.Random(seed), SORTED_BATCHES, checkpoint)
    if pair.once_more:
        fit_once_more(model, tokenizer, cache, pair.once_more, seed, label)
    aligned: PreTrainedModel = learner.merge_and_unload() if recipe.rank else model
    for source in base.iterdir():
        if source.suffix != ".safetensors":
            shutil.copy(source, target / source.name)
    aligned.to(STORAGE_DTYPE).save_pretrained(target)


def fit_once_more(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: Path, mix: Mix, seed: int, label: str
) -> None:
    """One pass with a smaller rate over questions in other shapes."""
    data = training_set(mix, seed + _OTHER_SHAPES, teacher(cache, mix.answer_tokens))
    rng = random.Random(seed)
    fit(model.train(), tokenizer, data, _ONCE_MORE, f"{label}, once more", rng, SORTED_BATCHES)


def teacher(cache: Path, tokens: int) -> Answers:
    """The kept answers of all pairs, cut off after so many tokens."""
    return kept_answers_of(base_of(cache, _TEACHER), cache / "answers.json", tokens)
