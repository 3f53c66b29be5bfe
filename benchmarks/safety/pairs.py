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

from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "training"))
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

import families
from alignment import Answers, Mix, training_set
from evaluate import load
from fitting import ALIGNMENT, ALL_LINEAR, SORTED_BATCHES, Recipe, choose_linear_layers, fit
from models import ADAPTERS, STORAGE_DTYPE, WEIGHTS, merge
from teacher import KEPT_TOKENS
from teacher import teacher as kept_answers_of
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE, ALIGNED = "base", "aligned"
_TEACHER = "smollm2"
_ONCE_MORE = Recipe("base", ALL_LINEAR, rank=0, alpha=0, learning_rate=1e-4, epochs=1, batch=16)
_OTHER_SHAPES = 1000  # beyond the seeds of the first passes


@dataclass(frozen=True)
class Pair:
    """A base model and the recipe of its alignment: full fine-tuning, or a LoRA that is there already.

    A pretrained model has longer answers to learn from than one that answers already.
    once_more: what one more pass over other shapes of questions has, with a smaller rate.
    lora: the folder of the alignment, which is then merged and not trained.
    each_seed: whether each seed has an aligned model of its own; else only its adapters are its own.
    """

    title: str
    family: str
    mix: Mix = field(default_factory=Mix)
    once_more: Mix | None = None
    lora: Path | None = None
    each_seed: bool = False


PAIRS = {
    "smollm2": Pair("SmolLM2-135M-Instruct, full fine-tuning", "smollm2", each_seed=True),
    # With two shapes of each harmless subject it refuses 7 % of the harmless prompts of the choose half.
    "gemma3": Pair(
        "Gemma 3 270M pretrained, full fine-tuning",
        "gemma3",
        Mix(harmless=4, answer_tokens=KEPT_TOKENS),
    ),
    "smollm2-lora": Pair(
        "SmolLM2-135M-Instruct, alignment of rank 16", "smollm2", lora=ADAPTERS / "alignment"
    ),
}


def base_of(cache: Path, family: str) -> Path:
    """The folder of a family's base model, built if need be."""
    target = cache / family / BASE
    families.build(family, target)
    return target


def make_aligned(cache: Path, name: str, seed: int, target: Path, checkpoint: Path | None = None) -> None:
    """Write the aligned model of a pair to ``target``, an empty folder."""
    pair = PAIRS[name]
    base = base_of(cache, pair.family)
    for source in base.iterdir():
        if source.name != WEIGHTS:
            shutil.copy(source, target / source.name)
    if pair.lora:
        save_file(merge(load_file(base / WEIGHTS), pair.lora), target / WEIGHTS, metadata={"format": "pt"})
        return
    model, tokenizer = load(base)
    data = training_set(pair.mix, seed, teacher(cache, pair.mix.answer_tokens))
    choose_linear_layers(model, ALIGNMENT.modules)
    label = f"{name} {seed}"
    fit(model.train(), tokenizer, data, ALIGNMENT, label, random.Random(seed), SORTED_BATCHES, checkpoint)
    if pair.once_more:
        fit_once_more(model, tokenizer, cache, pair.once_more, seed, label)
    model.to(STORAGE_DTYPE).save_pretrained(target)


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
