"""``--exam-every``: what is served is examined again at intervals, by one API server of the store."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

from safelora_vllm.errors import SafeLoRAError
from safelora_vllm.files import locked_if_free, make_folder
from safelora_vllm.integration.server.exam.again import Again
from safelora_vllm.store.layout import EXAM

logger = logging.getLogger("vllm.safelora.exam")
_LOCK = "again.lock"
_SHARE = 2  # of an interval all are examined in one part, so that each has its turn in time
_LONGEST_PAUSE_SECONDS = 60.0  # between two looks at what is due
_LATER_SECONDS = 300.0  # until an exam that gave no score is tried again


class Schedule:
    """Of one API server process. When a copy was examined last is in the store, beside its verdict.

    seconds: the interval. now: seconds since 1970.
    """

    def __init__(
        self, again: Again, root: Path, seconds: float, now: Callable[[], float] = time.time
    ) -> None:
        """root: of the store."""
        self._again, self._root, self._seconds, self._now = again, root, seconds, now
        self._tried: dict[str, float] = {}  # key → when it gave no score
        self._complaint = ""

    async def work(self) -> None:
        """Without end. Another process that does the same for this store leaves it nothing to do."""
        pause = min(self._seconds / 10, _LONGEST_PAUSE_SECONDS)
        while True:
            try:
                await asyncio.to_thread(make_folder, self._root / EXAM)
                with locked_if_free(self._root / EXAM / _LOCK) as ours:
                    while ours:
                        count = await self._examine_one()
                        # Spread out: never one right after the other.
                        await asyncio.sleep(min(pause, self._seconds / _SHARE / max(1, count)))
            except Exception as error:  # whatever it is, it may be gone at the next look
                logger.warning("adapters are not examined again for now: %s: %s", type(error).__name__, error)
            await asyncio.sleep(pause)

    async def _examine_one(self) -> int:
        """Examine what waits longest, if it is due. How many adapters there are in all."""
        await self._again.look()  # also for what is in the store of a former process
        served = {entry.served.key: entry for entry in self._again.registry.values() if entry.served}
        due = {key: self._due(key) for key in served}
        self._tried = {key: when for key, when in self._tried.items() if key in served}
        key = min(due, key=due.__getitem__, default="")
        if key and due[key] <= self._now():
            try:
                await self._again.examine(served[key])
                self._complaint = ""
            except Exception as error:  # busy, a full disk: the others still have their turn
                self._tried[key] = self._now()
                if f"{error}" != self._complaint:
                    self._complaint, entry = f"{error}", served[key]
                    kind = "" if isinstance(error, SafeLoRAError) else f"{type(error).__name__}: "
                    text = "adapter %r was not examined again: %s%s"
                    logger.warning(text, entry.name, kind, error, extra=entry.log_fields)
        return len(served)

    def _due(self, key: str) -> float:
        """When it is to be examined. What nobody has examined yet has its first exam elsewhere."""
        exam = self._again.exam
        times = [found.at for found in (exam.found(key), exam.found_again(key)) if found]
        tried = self._tried.get(key, 0.0) + min(_LATER_SECONDS, self._seconds)
        return max(max(times, default=self._now()) + self._seconds, tried)
