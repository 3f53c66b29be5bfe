"""The form in which chats reach the served model: its tokenizer, and the server's chat template."""

from __future__ import annotations

import inspect
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safelora_vllm.exam import chat


@dataclass(frozen=True)
class ChatFormat:
    """tokenizer: of transformers. template: that of ``--chat-template``. options: its own, by name."""

    tokenizer: Any
    template: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    async def of(cls, engine_client: Any, args: Namespace) -> ChatFormat:
        """From vLLM's engine client and the server's options."""
        tokenizer: Any = engine_client.get_tokenizer()
        tokenizer = await tokenizer if inspect.isawaitable(tokenizer) else tokenizer
        options = dict(getattr(args, "default_chat_template_kwargs", None) or {})
        return cls(tokenizer, _template(args), options)

    def openings(self) -> list[list[int]]:
        """`safelora_vllm.exam.chat.openings`."""
        return chat.openings(self.tokenizer, self.template, self.options)


def _template(args: Namespace) -> str | None:
    """The chat template of ``--chat-template``: a file's, or the text itself."""
    given = getattr(args, "chat_template", None)
    if not given:
        return None
    try:
        return Path(given).read_text()
    except OSError:
        return str(given)
