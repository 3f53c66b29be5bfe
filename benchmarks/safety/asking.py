"""Questions to the guarded server, and what its answers are worth."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from tqdm.asyncio import tqdm

_AT_ONCE = 256


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
                "model": q.model,
                "messages": [{"role": "user", "content": q.prompt}],
                "max_tokens": q.tokens,
                "temperature": 0,
            }
            for q in questions
        ]
        return [
            (answer["choices"][0]["message"]["content"] or "").strip()
            for answer in self._post("/v1/chat/completions", bodies)
        ]

    def likelihoods(self, said: Sequence[Said]) -> list[float]:
        """Mean log-probability of each answer's tokens (nats per token) under its model."""
        bodies, lengths = [], []
        for one in said:
            chat = [{"role": "user", "content": one.prompt}]
            text = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            prompt = self._tokenizer(text, add_special_tokens=False)["input_ids"]
            answer = self._tokenizer(one.answer or " ", add_special_tokens=False)["input_ids"]
            lengths.append(len(answer))
            bodies.append(
                {"model": one.model, "prompt": prompt + answer, "max_tokens": 1, "prompt_logprobs": 0}
            )
        found = []
        for length, answer in zip(lengths, self._post("/v1/completions", bodies), strict=True):
            tokens = answer["choices"][0]["prompt_logprobs"][-length:]
            found.append(sum(next(iter(token.values()))["logprob"] for token in tokens) / length)
        return found

    def _post(self, path: str, bodies: Iterable[Mapping[str, object]]) -> list[dict[str, Any]]:
        async def all_of_them() -> list[dict[str, Any]]:
            gate = asyncio.Semaphore(_AT_ONCE)
            async with httpx.AsyncClient(base_url=self._url, timeout=600) as http:

                async def one(body: Mapping[str, object]) -> dict[str, Any]:
                    async with gate:
                        answer = await http.post(path, json=body)
                    answer.raise_for_status()
                    return dict(answer.json())

                return list(await tqdm.gather(*map(one, bodies), desc="asking", unit="answer", leave=False))

        return asyncio.run(all_of_them())
