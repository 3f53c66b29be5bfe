"""The served model as an exam asks it: vLLM's own engine, by the client that answers requests."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from safelora_vllm.errors import ExamUnavailable, UsageError
from safelora_vllm.exam.chat import check_template, prompt_ids
from safelora_vllm.exam.reference import Tokens
from safelora_vllm.integration.seams.server import requests_now
from safelora_vllm.integration.server.exam.hidden_name import HIDDEN

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

R = TypeVar("R")
# Requests of exams in the engine. A prompt makes a step much longer, a further token of an answer hardly: so
# fewer have their prompts read at once, and only two while the engine answers others, who wait for its steps.
# With one alone, steps are hardly shorter on a CPU, and an exam is much longer: benchmarks/exam_steps.py.
_AT_ONCE, _READ_AT_ONCE, _READ_BESIDE_OTHERS = 16, 8, 2
_LAST, _USUAL = 2**31 - 1, 0  # vLLM's lowest priority, and that of requests that name none
_PATIENCE_SECONDS = 60.0  # for which an exam lets all others go first
# Probes after which an exam looks whether it is over. Not after each: its time would tell more of the score.
_LOOK_EVERY = 16
_LOGPROBS = ("raw_logprobs", "processed_logprobs")  # vLLM's modes that give log-probabilities


def _unheard() -> None:
    """Nobody counts the answers."""


def _never(_likelihoods: Sequence[float]) -> bool:
    """All are wanted."""
    return False


class EngineModel:
    """Asks the engine, with an adapter or without one.

    Its requests are those of nobody: they are not counted as traffic. While others are answered, few about an
    adapter go at once, and where the scheduler has priorities they have the lowest. Both for a while only: a
    server that is always busy would never answer them.
    """

    def __init__(
        self,
        engine_client: Any,
        tokenizer: Any,
        name: str,
        template: str | None = None,
        template_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Make it before requests are counted.

        Args:
            engine_client: vLLM's.
            tokenizer: of the model; name: its name, for errors.
            template: a chat template that the server was started with; template_options: its variables.

        Raises:
            UsageError: the model has no chat template, or vLLM gives no log-probabilities.
        """
        check_template(tokenizer, name, template)
        mode = getattr(engine_client.model_config, "logprobs_mode", _LOGPROBS[0])
        if mode not in _LOGPROBS:
            raise UsageError(f"--logprobs-mode is {mode}: expected {' or '.join(_LOGPROBS)} for an exam")
        self._generate: Callable[..., AsyncIterator[Any]] = engine_client.generate
        self._tokenizer, self._template = tokenizer, template
        self._template_options = template_options
        config = getattr(engine_client, "vllm_config", None)
        policy = getattr(getattr(config, "scheduler_config", None), "policy", "fcfs")
        self._has_priorities = policy == "priority"
        # Blocks of the prefix cache would tell, by their speed, what is asked.
        self._salt = secrets.token_hex(16)
        # vLLM's ids need not be random, and API servers share an engine.
        self._ids_begin = f"safelora-exam-{secrets.token_hex(8)}"
        self._numbers, self._free = itertools.count(), asyncio.Semaphore(_AT_ONCE)
        self._engine_client = engine_client
        self._read, self._few = asyncio.Semaphore(_READ_AT_ONCE), asyncio.Semaphore(_READ_BESIDE_OTHERS)

    async def answer(
        self,
        prompts: Sequence[str],
        tokens: int,
        adapter: LoRARequest | None = None,
        answered: Callable[[], None] = _unheard,
    ) -> list[tuple[Tokens, str]]:
        """As `safelora_vllm.exam.reference.Answers` has it; with an adapter, what that says.

        answered: is called at each answer.
        """

        until = _until()

        async def one(prompt: str) -> tuple[Tokens, str]:
            found = await self._ask(self._ids(prompt), adapter, until, max_tokens=tokens)
            answered()
            answer = tuple(found.outputs[0].token_ids)
            return answer, str(self._tokenizer.decode(answer, skip_special_tokens=True))

        return await _all([one(prompt) for prompt in prompts])

    async def likelihoods(
        self,
        prompts: Sequence[str],
        answers: Sequence[Tokens],
        adapter: LoRARequest | None = None,
        answered: Callable[[], None] = _unheard,
        enough: Callable[[Sequence[float]], bool] = _never,
    ) -> list[float]:
        """Mean log-probability of each answer's tokens, nats per token: a prefill each, and one token.

        answered: is called at each answer. enough: whether the first so many, a multiple of 16, will do.

        Raises:
            ExamUnavailable: the engine gives none.
        """

        until = _until()

        async def one(prompt: str, answer: Tokens) -> float:
            ids = self._ids(prompt)
            asked = [*ids, *answer]
            found = await self._ask(asked, adapter, until, max_tokens=1, prompt_logprobs=0)
            answered()
            given = list(found.prompt_logprobs or ())[len(ids) :]
            if len(given) != len(answer):
                raise ExamUnavailable(f"the engine gave {len(given)} likelihoods: expected {len(answer)}")
            return fmean(float(of[token].logprob) for of, token in zip(given, answer, strict=True))

        pairs, found = list(zip(prompts, answers, strict=True)), list[float]()
        while len(found) < len(pairs) and not (found and enough(found)):
            found += await _all([one(*pair) for pair in pairs[len(found) :][:_LOOK_EVERY]])
        return found

    async def _ask(self, ids: list[int], adapter: LoRARequest | None, until: float, **options: int) -> Any:
        """The engine's last output. until: when, by the loop's time, the request is as urgent as others."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, detokenize=False, **options)
        prompt = {"type": "token", "prompt_token_ids": ids, "cache_salt": self._salt}

        async def ask(**priority: int) -> Any:
            request = f"{self._ids_begin}-{next(self._numbers)}"
            outputs = self._generate(prompt, params, request, lora_request=adapter, **priority)
            async with self._read, self._beside_others(adapter, until):
                last = await anext(outputs, None)
            async for output in outputs:
                last = output
            return last

        async with self._free:
            if not self._has_priorities:
                last = await ask()
            else:
                try:
                    async with asyncio.timeout_at(until):
                        last = await ask(priority=_LAST)
                except TimeoutError:
                    last = await ask(priority=_USUAL)
        if last is None or not last.outputs:
            raise ExamUnavailable("the engine gave no answer to an exam: try again later")
        return last

    @asynccontextmanager
    async def _beside_others(self, adapter: LoRARequest | None, until: float) -> AsyncIterator[None]:
        """Few prompts at a time, if they are about an adapter and others are answered."""
        if adapter is None or asyncio.get_running_loop().time() > until or not self._others():
            yield
        else:
            async with self._few:
                yield

    def _others(self) -> bool:
        """Whether the engine answers requests of this API server that are none of an exam."""
        running, waiting = requests_now(self._engine_client)
        return any(not name.startswith(HIDDEN) for name in (*running, *waiting))

    def _ids(self, prompt: str) -> list[int]:
        return prompt_ids(self._tokenizer, prompt, self._template, self._template_options)


def _until() -> float:
    return asyncio.get_running_loop().time() + _PATIENCE_SECONDS


async def _all(asked: Sequence[Coroutine[Any, Any, R]]) -> list[R]:
    """What all of them give. Where one fails, the others end."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
