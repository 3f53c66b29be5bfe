"""How the exam asks a model: one user turn in the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from safelora_vllm.errors import UsageError


def check_template(tokenizer: Any, model: str, template: str | None = None) -> None:
    """Raise UsageError where there is nothing to ask in. template: a server's own, if it has one."""
    if not template and tokenizer.chat_template is None:
        raise UsageError(f"{model} has no chat template: an exam asks as a chat would")


_LEAST = 2  # tokens of an opening: one alone, such as a line's end, may end any prompt
_SWITCHES = ({}, *({name: on} for name in ("enable_thinking", "thinking") for on in (True, False)))


def openings(
    tokenizer: Any, template: str | None = None, options: Mapping[str, Any] | None = None
) -> list[list[int]]:
    """The tokens between a user's words and an answer, one list for each way in which callers switch thought.

    tokenizer, template, options: as for `prompt_ids`. Empty where the template has none.
    """
    found = []
    for switch in _SWITCHES:
        given = {**(options or {}), **switch}
        try:
            ends = [prompt_ids(tokenizer, words, template, given)[::-1] for words in ("A cat", "7 rivers!")]
        except Exception:  # templates and tokenizers raise what they like; without an opening more is asked
            continue
        same = list(takewhile(lambda pair: pair[0] == pair[1], zip(*ends, strict=False)))
        opening = [token for token, _ in same][::-1]
        if _LEAST <= len(opening) < len(ends[0]) and opening not in found:
            found.append(opening)
    return found


def prompt_ids(
    tokenizer: Any, prompt: str, template: str | None = None, options: Mapping[str, Any] | None = None
) -> list[int]:
    """The tokens before an answer. tokenizer: of transformers. options: of the template, by name."""
    given = {**(options or {}), **({"chat_template": template} if template else {})}
    text = ""
    for content in (prompt, [{"type": "text", "text": prompt}]):  # some templates take parts only
        if prompt not in text:
            chat = [{"role": "user", "content": content}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **given)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
