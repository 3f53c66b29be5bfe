"""Questions to the guarded server, and what its answers are worth.

Many prompts are in one request: requests take processors that the model needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any, TypeVar

import httpx
from tqdm.asyncio import tqdm

_PROMPTS, _AT_ONCE = 32, 8  # of one request; requests
_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """One greedy chat completion by one served adapter."""

    model: str
    prompt: str
    tokens: int


@dataclass(frozen=True)
class Said:
    """A prompt with an answer that somebody gave, to be judged by a model for its likelihood."""

    model: str
    prompt: str
    answer: str


class Asker:
    """Asks one server, many questions at once; the order of the answers is that of the questions."""

    def __init__(self, port: int, tokenizer: Any) -> None:
        self._url, self._tokenizer = f"http://127.0.0.1:{port}", tokenizer

    def answers(self, questions: Sequence[Question]) -> list[str]:
        """The text of each answer."""
        bodies = [
            {
                "model": model,
                "messages": [_chat(q.prompt) for q in some],
                "max_tokens": tokens,
                "temperature": 0,
            }
            for (model, tokens), some in _alike(questions, attrgetter("model", "tokens"))
        ]
        choices = self._choices("/v1/chat/completions/batch", bodies)
        return [(choice["message"]["content"] or "").strip() for choice in choices]

    def likelihoods(self, said: Sequence[Said]) -> list[float]:
        """Mean log-probability of each answer's tokens (nats per token) under its model."""
        bodies, lengths = [], []
        for model, some in _alike(said, attrgetter("model")):
            prompts = [
                self._tokenizer.apply_chat_template(
                    _chat(one.prompt), add_generation_prompt=True, tokenize=False
                )
                for one in some
            ]
            answers = self._ids([one.answer or " " for one in some])
            whole = [prompt + answer for prompt, answer in zip(self._ids(prompts), answers, strict=True)]
            bodies.append({"model": model, "prompt": whole, "max_tokens": 1, "prompt_logprobs": 0})
            lengths += map(len, answers)
        judged = [choice["prompt_logprobs"] for choice in self._choices("/v1/completions", bodies)]
        return [
            sum(next(iter(token.values()))["logprob"] for token in tokens[-length:]) / length
            for tokens, length in zip(judged, lengths, strict=True)
        ]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return list(self._tokenizer(texts, add_special_tokens=False)["input_ids"])

    def _choices(self, path: str, bodies: Iterable[Mapping[str, object]]) -> Iterator[dict[str, Any]]:
        for answer in self._post(path, bodies):
            yield from sorted(answer["choices"], key=itemgetter("index"))

    def _post(self, path: str, bodies: Iterable[Mapping[str, object]]) -> list[dict[str, Any]]:
        async def all_of_them() -> list[dict[str, Any]]:
            gate = asyncio.Semaphore(_AT_ONCE)
            async with httpx.AsyncClient(base_url=self._url, timeout=600) as http:

                async def one(body: Mapping[str, object]) -> dict[str, Any]:
                    async with gate:
                        answer = await http.post(path, json=body)
                    answer.raise_for_status()
                    return dict(answer.json())

                return list(await tqdm.gather(*map(one, bodies), desc="asking", unit="request", leave=False))

        return asyncio.run(all_of_them())


def _chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _alike(asked: Sequence[_T], what: attrgetter[Any]) -> Iterator[tuple[Any, list[_T]]]:
    """As many as one request holds, of neighbours that have the same model and limits."""
    for same, group in groupby(asked, key=what):
        some = list(group)
        for i in range(0, len(some), _PROMPTS):
            yield same, some[i : i + _PROMPTS]
