"""Counts the requests that an API server gives the engine, by the adapter that they name.

vLLM's stat loggers do not say which adapter a finished request had, and answers on the wire have their tokens
only where the client asks for them. So the engine client's ``generate`` and ``encode``, which every route of
vLLM uses, are wrapped: they know the adapter, and their outputs have tokens, the reason of the end and vLLM's
own time stamps. `seams.server` wraps them.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from safelora_vllm.integration.server.traffic import BASE, OUTCOMES, TrafficTable

logger = logging.getLogger("vllm.safelora.metrics")


async def counted(outputs: Any, adapter: str | None, delta: bool, table: TrafficTable) -> AsyncIterator[Any]:
    """The outputs of one request, unchanged.

    Args:
        outputs: vLLM's generator.
        adapter: its name; None for the model itself.
        delta: each output has the new tokens only.
        table: where it is counted.
    """
    request = _Request(table, adapter or BASE, delta)
    try:
        async with aclosing(outputs):
            async for output in outputs:
                request.saw(output)
                yield output
        request.end("stop")
    except (asyncio.CancelledError, GeneratorExit):
        request.end("abort")
        raise
    except Exception:
        request.end("error")
        raise


def _fenced(step: Callable[..., None]) -> Callable[..., None]:
    """A step of counting, which ends no request whatever is wrong with it."""

    @functools.wraps(step)
    def counts(*arguments: Any) -> None:
        try:
            step(*arguments)
        except Exception as error:
            _say_once(type(error).__name__)

    return counts


@functools.lru_cache(maxsize=16)
def _say_once(kind: str) -> None:
    logger.exception("requests are not counted in full: %s. They are answered all the same", kind)


class _Request:
    def __init__(self, table: TrafficTable, name: str, delta: bool) -> None:
        self._table, self._name, self._delta = table, name, delta
        self._tokens: Counter[int] = Counter()
        self._prompt_known = self._ended = False
        self._begin()

    @_fenced
    def _begin(self) -> None:
        self._table.began(self._name)

    @_fenced
    def saw(self, output: Any) -> None:
        """Count what an output brings."""
        if not self._prompt_known and (prompt := getattr(output, "prompt_token_ids", None)) is not None:
            self._prompt_known = True
            self._table.prompt(self._name, len(prompt))
        completions = getattr(output, "outputs", ())
        if not isinstance(completions, list):  # of a pooling model
            completions = ()
        for completion in completions:
            found = len(completion.token_ids)
            self._tokens[completion.index] = found + (self._tokens[completion.index] if self._delta else 0)
        if output.finished:
            self._times(getattr(output, "metrics", None))
            reasons = {getattr(completion, "finish_reason", None) for completion in completions}
            worst = [reason for reason in ("error", "abort", "length") if reason in reasons]
            self.end(worst[0] if worst else "stop")

    def _times(self, stats: Any) -> None:
        """vLLM's own time stamps; there are none with ``--disable-log-stats``."""
        if (first := getattr(stats, "first_token_latency", 0.0)) > 0:
            later = stats.num_generation_tokens - 1
            each = (stats.last_token_ts - stats.first_token_ts) / later if later > 0 else None
            self._table.timed(self._name, first, each)

    @_fenced
    def end(self, outcome: str) -> None:
        """Count the request once."""
        assert outcome in OUTCOMES
        if not self._ended:
            self._ended = True
            self._table.ended(self._name, outcome, self._tokens.total())
