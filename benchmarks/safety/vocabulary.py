"""Cuts a model's vocabulary to its most frequent tokens: less to compute, and the same linear layers.

A small model with a large vocabulary spends most of its time on the head, which no adapter here changes.
Words that lose their token are written in several; other characters are written in bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

_TOKENIZER, _CONFIG, _WEIGHTS = "tokenizer.json", "config.json", "model.safetensors"
_EMBEDDING = "model.embed_tokens.weight"


def cut(folder: Path, tokens: int, characters: int) -> None:
    """Rewrite a model with tied embeddings and a byte-pair tokenizer with byte fallback.

    tokens: so many are kept, from the first on: in their order they were merged, so the frequent come first.
    characters: so many of the single characters behind them are kept as well.
    """
    tokenizer = json.loads((folder / _TOKENIZER).read_text())
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    behind = sorted(number for text, number in vocabulary.items() if len(text) == 1 and number >= tokens)
    kept = [*range(tokens), *behind[:characters]]
    _cut_tokenizer(tokenizer, {number: i for i, number in enumerate(kept)})
    (folder / _TOKENIZER).write_text(json.dumps(tokenizer, ensure_ascii=False))

    weights = load_file(folder / _WEIGHTS)
    weights[_EMBEDDING] = weights[_EMBEDDING][kept].contiguous()
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / _CONFIG).read_text())
    (folder / _CONFIG).write_text(json.dumps(config | {"vocab_size": len(kept)}, indent=2) + "\n")


def _cut_tokenizer(tokenizer: dict[str, Any], place: dict[int, int]) -> None:
    """Leave out tokens without a new place, and merges that need or make one of them."""
    model = tokenizer["model"]
    model["vocab"] = {text: place[number] for text, number in model["vocab"].items() if number in place}
    model["merges"] = [
        (left, right)
        for left, right in model["merges"]
        if {left, right, left + right} <= model["vocab"].keys()
    ]
    tokenizer["added_tokens"] = [
        token | {"id": place[token["id"]]} for token in tokenizer["added_tokens"] if token["id"] in place
    ]
