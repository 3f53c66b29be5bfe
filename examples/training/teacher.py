"""The answers that an aligned model keeps: those of the base model, written once."""

from __future__ import annotations

from pathlib import Path

from alignment import Answers, kept_answers
from evaluate import generate, load
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

KEPT_TOKENS = 24  # of the answers in the file; a training set may cut them shorter


def teacher(base: Path, file: Path, tokens: int) -> Answers:
    """The kept answers, cut off after so many tokens. Their model is loaded when one is missing."""
    loaded: list[tuple[PreTrainedModel, PreTrainedTokenizerBase]] = []

    def answer(prompts: list[str]) -> list[str]:
        if not loaded:
            model, tokenizer = load(base)
            loaded.append((model, tokenizer))
        return [text.strip() for text in generate(*loaded[0], prompts, KEPT_TOKENS)]

    tokenizer = AutoTokenizer.from_pretrained(base)
    return kept_answers(file, answer, lambda text: _cut(tokenizer, text, tokens))


def _cut(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> tuple[str, bool]:
    """The first so many tokens of a kept answer, and whether they are the whole answer."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) > tokens:
        return tokenizer.decode(ids[:tokens]), False
    return text, len(ids) < KEPT_TOKENS - 1  # a token may be lost where an answer is stripped
