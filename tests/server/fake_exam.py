"""An engine that answers exams by a script: how far an adapter is from the aligned model's answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safelora_vllm.exam import probes
from safelora_vllm.integration.adapter_uri import published_key
from safelora_vllm.report import Report
from tests.server.fake_engine import FakeEngine

ANSWER = [7, 8, 9]  # tokens of every answer of the aligned model to a probe
HELP = [4, 5]  # to what is harmless
_USUAL = ("add_generation_prompt", "tokenize")


class FakeTokenizer:
    """Letters are tokens. says: the text of every answer."""

    chat_template: str | None = "a template"
    says = "I'm sorry, but I cannot help with that."
    options: Mapping[str, object] = {}

    def apply_chat_template(self, chat: list[dict[str, str]], **options: object) -> str:
        self.options = {name: of for name, of in options.items() if name not in _USUAL}
        return chat[0]["content"]

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, tokens: object, skip_special_tokens: bool) -> str:
        assert skip_special_tokens and list(tokens) in (ANSWER, HELP)  # type: ignore[call-overload]
        return self.says if list(tokens) == ANSWER else "Of course. Here it is."  # type: ignore[call-overload]


async def _nothing() -> None:
    """Nothing happens before an answer."""


@dataclass
class ExaminedEngine(FakeEngine):
    """drop: nats a token, of a published copy with this report. before: each answer.

    overs: harmless probes that adapters refuse.
    """

    store: Path = Path()
    drop: Callable[[Report], float] = lambda _: 0.0
    before: Callable[[], Awaitable[None]] = _nothing
    asked: list[str] = field(default_factory=list)  # keys of published copies, one for each probe
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    overs: int = 0
    answered: list[str | None] = field(default_factory=list)  # by which adapter, None for the model itself
    names: set[str] = field(default_factory=set)
    texts: list[str] = field(
        default_factory=list
    )  # probes that adapters were asked, with the answer's tokens

    def get_tokenizer(self) -> FakeTokenizer:
        return self.tokenizer

    async def generate(
        self, prompt: dict[str, list[int]], params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        assert request_id.startswith("safelora-exam-")
        if params.prompt_logprobs is None:
            self.answered.append(lora_request and lora_request.lora_name)
        await self.before()
        await asyncio.sleep(0)
        outputs = [SimpleNamespace(token_ids=ANSWER, text=self.tokenizer.says, finish_reason="stop")]
        if params.prompt_logprobs is None:
            text, harmless = "".join(map(chr, prompt["prompt_token_ids"])), probes.harmless(probes.LANGUAGES)
            refused = harmless[: self.overs] if lora_request is not None else ()
            if text in harmless and text not in refused:
                outputs = [SimpleNamespace(token_ids=HELP, text="Of course.", finish_reason="stop")]
            yield SimpleNamespace(outputs=outputs, prompt_logprobs=None)
            return
        value = -1.0
        if lora_request is not None:
            assert lora_request in self.loaded
            self.names.add(lora_request.lora_name)
            self.texts.append("".join(map(chr, prompt["prompt_token_ids"])))
            self.asked.append(key := published_key(lora_request.lora_path))
            report = json.loads((self.store / "published" / key / "report.json").read_text())["report"]
            value -= self.drop(Report.from_dict(report))
        given = [{token: SimpleNamespace(logprob=value)} for token in prompt["prompt_token_ids"]]
        yield SimpleNamespace(outputs=outputs, prompt_logprobs=[None, *given[1:]])
