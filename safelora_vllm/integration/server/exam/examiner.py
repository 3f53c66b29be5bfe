"""Examines published copies: one at a time in a process, under a name that no caller can give."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple
from weakref import WeakValueDictionary

from vllm.lora.request import LoRARequest

from safelora_vllm.errors import AdapterRefused, ExamUnavailable, Reason, SafeLoRAError, Unavailable
from safelora_vllm.exam.reference import ANSWER_TOKENS, Reference, refuses
from safelora_vllm.exam.score import Score
from safelora_vllm.integration.server.background import Background
from safelora_vllm.integration.server.callers import caller
from safelora_vllm.integration.server.engine import Pool, ask_workers
from safelora_vllm.integration.server.exam.counts import (
    FAILED,
    PASSED,
    PASSED_WITH_OPINION,
    UNAVAILABLE,
    Counts,
)
from safelora_vllm.integration.server.exam.engine_model import EngineModel
from safelora_vllm.integration.server.exam.hidden_name import HIDDEN_NAME
from safelora_vllm.integration.server.exam.limits import ExamLimits, NoTurn
from safelora_vllm.integration.server.exam.sheets import Sheet, Sheets
from safelora_vllm.integration.server.tracing import span
from safelora_vllm.store import PublishedStore
from safelora_vllm.store.failed_tenants import FailedTenants
from safelora_vllm.store.verdicts import Examined

logger = logging.getLogger("vllm.safelora.exam")
_SECONDS = 120.0  # for the next answer of the engine
_LONGEST_SECONDS = 300.0  # for all its answers about a copy: a slow machine needs minutes
_PAUSE_SECONDS = 1.0  # before a copy that vLLM could not load is loaded again


class NotLoaded(ExamUnavailable):
    """vLLM could not load a copy, twice. reasons: in its own words."""

    def __init__(self, reasons: Sequence[Reason]) -> None:
        super().__init__(f"{reasons[0].message}. It is tried again")
        self.reasons = list(reasons)


class Asked(NamedTuple):
    """A published copy of which the engine is asked.

    name: of an adapter that is to be served by it, for the log. rung: its policy's name, for the counts.
    threshold: the largest bound that passes, nats per token. bound: the same, infinite where it passes with a
    second opinion whatever it scores. whole: all probes are to be asked, also where it has failed by then.
    """

    name: str
    key: str
    rung: str
    threshold: float
    bound: float
    whole: bool = False

    @property
    def passing(self) -> str:
        """Which bounds pass, in words."""
        if math.isinf(self.bound):
            return "any passes with a second opinion"
        return f"at most {self.threshold:g} passes"

    def is_over(self, score: Score) -> bool:
        """Whether a score says enough."""
        return score.is_whole or (not self.whole and score.settles(self.bound))

    def verdict(self, score: Score) -> str:
        """One of the words that exams are counted by."""
        if score.passes(self.threshold):
            return PASSED
        return PASSED_WITH_OPINION if score.passes(self.bound) else FAILED


class Examiner:
    """One API server process asks the engine what published copies are like.

    sheets: what is asked. failed: tenants of whom an adapter failed a re-examination. scored: when an exam
    last gave a score, seconds of the monotonic clock.
    """

    def __init__(
        self,
        model: EngineModel,
        pool: Pool,
        published: PublishedStore,
        sheets: Sheets,
        counts: Counts,
        failed: FailedTenants,
    ) -> None:
        self.sheets, self.counts, self.failed = sheets, counts, failed
        self.background, self.limits = Background(), ExamLimits()
        self._model, self._pool, self._published = model, pool, published
        self.scored = -math.inf
        self._turn = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # of each tenant

    async def examine(self, asked: Asked, nbytes: float, ticket: Callable[[], None]) -> Examined:
        """What a copy is like by the first half of the probes.

        It is from the store where the copy, or another one with the same files, was examined before.

        Raises:
            TooManyExams: the tenant has had its share.
            Unavailable: there is no score. NotLoaded: as vLLM cannot load it.
        """
        sheet = self.sheets.first
        if found := await self._known(sheet, asked):
            return found
        ticket()
        async with self._in_turn():
            return await self._known(sheet, asked) or await self._counted(sheet, asked, nbytes)

    async def _known(self, sheet: Sheet, asked: Asked) -> Examined | None:
        found = await asyncio.to_thread(sheet.verdicts.of_same_files, asked.key)
        return found if found and asked.is_over(found.score) else None

    async def examine_again(self, asked: Asked, nbytes: float = math.inf) -> Examined:
        """What a copy is like now by the held-out half, all of it: other names with it may pass by more.

        Raises:
            UsageError: the aligned model does not refuse that half.
            Unavailable: there is no score. NotLoaded: as vLLM cannot load it.
        """
        async with self._in_turn():
            return await self._counted(self.sheets.held_out, asked._replace(whole=True), nbytes)

    async def _counted(self, sheet: Sheet, asked: Asked, nbytes: float) -> Examined:
        began, verdict = time.perf_counter(), UNAVAILABLE
        try:
            with span("exam", rung=asked.rung):
                found = await self._examined(sheet, asked, nbytes, began)
            verdict, self.scored = asked.verdict(found.score), time.monotonic()
        finally:
            self.counts.count(verdict, asked.rung, time.perf_counter() - began)
        text = "exam of adapter %r by %s: %s, bound %.4f%s, %s (%.0f s, copy %s)"
        asked_of = f" by the first {found.score.probes} probes" if not found.score.is_whole else ""
        figures = (found.score.bound, asked_of, asked.passing, found.seconds, asked.key[:12])
        logger.info(
            text, asked.name, asked.rung, verdict.replace("_", " "), *figures, extra={"adapter": asked.name}
        )
        return found

    @asynccontextmanager
    async def _in_turn(self) -> AsyncIterator[None]:
        """One exam at a time. Each tenant has one at most in the queue of all."""
        who = caller()
        turn = self._turns.setdefault((who and who.tenant) or "", asyncio.Lock())
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(wait := _LONGEST_SECONDS + _SECONDS):
                    await held.enter_async_context(turn)
                    await held.enter_async_context(self._turn)
            except TimeoutError as error:
                raise NoTurn(f"other exams have not ended in {wait:.0f} s: try again later") from error
            yield

    async def _examined(self, sheet: Sheet, asked: Asked, nbytes: float, began: float) -> Examined:
        key = asked.key
        files = await asyncio.to_thread(self._published.digests, key)
        known = await _reference(sheet)
        score, over_refusal = await self._score(known, asked, nbytes)
        if files is None or files != await asyncio.to_thread(self._published.digests, key):
            raise ExamUnavailable("the published copy was exchanged during its exam: try again")
        found = Examined(score, time.perf_counter() - began, files, time.time(), over_refusal)
        await asyncio.to_thread(sheet.verdicts.put, key, found)
        return found

    async def _score(self, known: Reference, asked: Asked, nbytes: float) -> tuple[Score, float | None]:
        """Load the copy as it would be served, ask, and free it. Also its over-refusal, if it passes."""
        request = self._pool.request(HIDDEN_NAME, asked.key, await self._pool.new_id())
        try:
            async with _while_answers_come() as answered:
                await self._load(request, nbytes)
                said = await self._model.likelihoods(
                    known.prompts,
                    known.answers,
                    request,
                    answered,
                    lambda said: asked.is_over(known.score(said)),
                )
                # Where a worker could not read the copy again, the aligned model has answered in its place.
                lost = {
                    path for worker in await ask_workers(self._pool.engine_client) for path in worker.lost
                }
                if request.lora_path in lost:
                    self._pool.mark_lost({request.lora_path})
                    raise ExamUnavailable("the published copy was lost during its exam: try again")
                score = known.score(said)
                passes = score.passes(asked.bound)
                refused = await self._refused(known, request, answered) if passes else None
            return score, refused
        except TimeoutError as error:
            raise ExamUnavailable(
                f"the engine is too busy for an exam: no answer for {_SECONDS:.0f} s, or not all in "
                f"{_LONGEST_SECONDS:.0f} s. Try again later"
            ) from error
        except ExamUnavailable:
            raise
        except Unavailable as error:
            raise ExamUnavailable(str(error)) from error
        except SafeLoRAError:
            raise
        except Exception as error:  # the engine raises what it likes
            raise ExamUnavailable(
                f"the engine ended an exam ({type(error).__name__}): try again later"
            ) from error
        finally:
            self.background.spawn(self._pool.release(request, wanted=lambda _: False))

    async def _refused(
        self, known: Reference, request: LoRARequest, answered: Callable[[], None]
    ) -> float | None:
        """The share of harmless prompts that an adapter refuses and the aligned model does not."""
        if not known.harmless:
            return None
        said = await self._model.answer(known.harmless, ANSWER_TOKENS, request, answered)
        return sum(refuses(text) for _, text in said) / len(said)

    async def _load(self, request: LoRARequest, nbytes: float) -> None:
        """Load a copy. vLLM does not say whether the copy or a moment is to blame when it fails."""
        try:
            await self._pool.load(request, nbytes)
        except AdapterRefused:
            await asyncio.sleep(_PAUSE_SECONDS)
            try:
                await self._pool.load(request, nbytes)
            except AdapterRefused as error:
                raise NotLoaded(error.reasons) from error


@asynccontextmanager
async def _while_answers_come() -> AsyncIterator[Callable[[], None]]:
    """Time out unless what this yields is called often enough, and when it is all too long."""
    now = asyncio.get_running_loop().time
    end = now() + _LONGEST_SECONDS
    async with asyncio.timeout(_SECONDS) as limit:
        yield lambda: limit.reschedule(min(now() + _SECONDS, end))


async def _reference(sheet: Sheet) -> Reference:
    try:
        return await sheet.reference()
    except SafeLoRAError:
        raise
    except Exception as error:  # the engine raises what it likes
        raise ExamUnavailable(
            f"the aligned model did not answer the probes ({type(error).__name__}): try again later"
        ) from error
