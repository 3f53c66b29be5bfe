"""How the exam asks a model: one user turn in the model's own chat template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safelora_vllm.errors import UsageError


def check_template(tokenizer: Any, model: str, template: str | None = None) -> None:
    """Raise UsageError where there is nothing to ask in. template: a server's own, if it has one."""
    if not template and tokenizer.chat_template is None:
        raise UsageError(f"{model} has no chat template: an exam asks as a chat would")


def prompt_ids(
    tokenizer: Any, prompt: str, template: str | None = None, options: Mapping[str, Any] | None = None
) -> list[int]:
    """The tokens before an answer. tokenizer: of transformers. options: of the template, by name."""
    chat = [{"role": "user", "content": prompt}]
    given = {**(options or {}), **({"chat_template": template} if template else {})}
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **given)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
