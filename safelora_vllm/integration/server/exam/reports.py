"""Copies that are served whatever comes out are examined in the background, one after the other."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable

from safelora_vllm.errors import Unavailable
from safelora_vllm.integration.server.background import Background
from safelora_vllm.integration.server.callers import acting_as
from safelora_vllm.integration.server.exam.limits import ExamLimits, Limit, TooManyExams
from safelora_vllm.policy import Policy
from safelora_vllm.store.name_record import tenant_of

logger = logging.getLogger("vllm.safelora.exam")
_LATER_SECONDS = 15.0
_TRIES = 3  # exams of one copy that end without a score


def _nothing() -> None:
    """Counts no exam."""


class Reports:
    """What waits for its exam in one API server process.

    examine: gets a name, the copy that it serves, the policy that it was made by, and what counts an exam.
    """

    def __init__(
        self,
        background: Background,
        limits: ExamLimits,
        limit: Callable[[str], Limit],
        examine: Callable[[str, str, Policy, Callable[[], None]], Awaitable[None]],
    ) -> None:
        """limit: of the tenant that owns a name."""
        self._background, self._limits, self._limit, self._examine = background, limits, limit, examine
        self.waiting: dict[str, tuple[str, Policy]] = {}  # name → the copy that it serves now
        self._in_vain = Counter[str]()  # name → exams of its copy without a score
        self._working = False

    def add(self, name: str, key: str, policy: Policy) -> None:
        """Examine a copy, if it is still served by the name when its turn comes."""
        self.drop(name)
        self.waiting[name] = key, policy
        if not self._working:
            self._working = True
            self._background.spawn(self._work())

    def drop(self, name: str) -> None:
        """Its copy is not examined any more."""
        self.waiting.pop(name, None)
        del self._in_vain[name]

    async def _work(self) -> None:
        """Examine what waits. What is over its tenant's limits, or has no score yet, stays until later."""
        try:
            while self.waiting:
                for name, copy in list(self.waiting.items()):
                    tried = self._is_due(name, copy) and await self._tried(name, *copy)
                    if tried and self._is_due(name, copy):
                        self.drop(name)
                if self.waiting:
                    await asyncio.sleep(_LATER_SECONDS)
        finally:
            self._working = False

    def _is_due(self, name: str, copy: tuple[str, Policy]) -> bool:
        return self.waiting.get(name) == copy

    async def _tried(self, name: str, key: str, policy: Policy) -> bool:
        """Whether a copy is done with: not where its tenant has had its share, or another try may help."""
        try:
            # Whoever's request has begun this, it is the exam of the name's owner.
            with acting_as(None), self._limits.share(tenant_of(name), self._limit(name)) as ticket:
                again = bool(self._in_vain[name])  # the first try has counted
                await self._examine(name, key, policy, _nothing if again else ticket)
        except TooManyExams:
            return False
        except Exception as error:  # a full disk, say: the other copies still have their turn
            passing = isinstance(error, Unavailable) and self._is_due(name, (key, policy))
            again = passing and self._in_vain[name] < _TRIES - 1
            about = {"adapter": name, "copy": key}  # else again when it is served next
            more = ". It is tried again" if again else ""
            logger.warning("adapter %r was not examined: %s%s", name, error, more, extra=about)
            if again:
                self._in_vain[name] += 1
                return False
        return True
