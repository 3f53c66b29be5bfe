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
from transformers import PreTrainedModel

BASE, ALIGNED = "base", "aligned"
_TEACHER = "smollm2"
_FURTHER = Recipe("base", ALL_LINEAR, rank=0, alpha=0, learning_rate=2e-4, epochs=1, batch=16)
_OTHER_SHAPES = 1000  # from the seed of one pass's shapes to that of the next


@dataclass(frozen=True)
class Pair:
    """A base model and the recipe of its alignment: full fine-tuning, or a LoRA that is there already.

    A pretrained model has longer answers to learn from than one that answers already.
    further: what further passes have, each over other shapes of questions, with a smaller rate. The aligned
    model is then the mean of the weights after each pass: it refuses less that is harmless than the last one.
    lora: the folder of the alignment, which is then merged and not trained.
    each_seed: whether each seed has an aligned model of its own; else only its adapters are its own.
    """

    title: str
    family: str
    mix: Mix = field(default_factory=Mix)
    further: tuple[Mix, ...] = ()
    lora: Path | None = None
    each_seed: bool = False


PAIRS = {
    "smollm2": Pair("SmolLM2-135M-Instruct, full fine-tuning", "smollm2", each_seed=True),
    # After each pass alone it refuses 11, 6 and 7 % of the harmless prompts of the choose half.
    "gemma3": Pair(
        "Gemma 3 270M pretrained, full fine-tuning",
        "gemma3",
        Mix(harmless=4, answer_tokens=KEPT_TOKENS),
        further=(
            Mix(harmful=1, harmless=5, lookalikes=3, answer_tokens=KEPT_TOKENS),
            Mix(harmful=2, harmless=2, more_harmless=4, lookalikes=3, answer_tokens=KEPT_TOKENS),
        ),
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
    ends = [_rounded(model)] if pair.further else []
    for number, mix in enumerate(pair.further, 1):
        data = training_set(mix, seed + number * _OTHER_SHAPES, teacher(cache, mix.answer_tokens))
        what = f"{label}, further pass {number}"
        fit(model.train(), tokenizer, data, _FURTHER, what, random.Random(seed), SORTED_BATCHES)
        ends.append(_rounded(model))
    with torch.no_grad():
        for name, weight in model.named_parameters() if ends else ():
            weight.copy_(torch.stack([end[name].float() for end in ends]).mean(0))
    model.to(STORAGE_DTYPE).save_pretrained(target)


def at_strength(base: Path, trained: Path, strength: float, target: Path) -> None:
    """Write base + strength · (trained − base) to ``target``, an empty folder."""
    for source in trained.iterdir():
        if source.name != WEIGHTS or strength == 1.0:
            shutil.copy(source, target / source.name)
    if strength != 1.0:
        before, after = load_file(base / WEIGHTS), load_file(trained / WEIGHTS)
        mixed = {
            name: torch.lerp(before[name].float(), weight.float(), strength).to(weight.dtype)
            for name, weight in after.items()
        }
        save_file(mixed, target / WEIGHTS, metadata={"format": "pt"})


def _rounded(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights as they would be stored, which the model has from now on."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(STORAGE_DTYPE))
    return {name: weight.detach().to(STORAGE_DTYPE) for name, weight in model.named_parameters()}


def teacher(cache: Path, tokens: int) -> Answers:
    """The kept answers of all pairs, cut off after so many tokens."""
    return kept_answers_of(base_of(cache, _TEACHER), cache / "answers.json", tokens)
