"""Work that anybody may ask for and that may hang: done once at a time, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class OneAtATime(Generic[T]):
    """However many ask, one thread works, and its answer is for all of them. Belongs to one event loop.

    The thread is none of asyncio's few, which all other requests need. It ends with the process.

    Args:
        work: blocks; its errors go to all who wait.
        seconds: from the work's begin, for which callers wait.
        kept: seconds for which an answer is given to those who ask later.
    """

    def __init__(self, work: Callable[[], T], seconds: float, kept: float = 0.0) -> None:
        self._work, self._seconds, self._kept = work, seconds, kept
        self._running: asyncio.Future[T] | None = None
        self._began = self._ended = 0.0

    async def answer(self) -> T:
        """The answer of the work that is under way, or of the last one while it is kept.

        Raises:
            TimeoutError: there is none yet. The work goes on, and no other one is begun before it has ended.
        """
        running, now = self._running, time.monotonic()
        if running is None or (running.done() and now - self._ended >= self._kept):
            self._running, self._began = running, now = self._start(), now
        left = self._began + self._seconds - now
        return await asyncio.wait_for(asyncio.shield(running), max(left, 0.0))

    def _start(self) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # asked for, or not

        def work() -> None:
            end: Callable[[], None]
            try:
                found = self._work()
            except Exception as error:
                end = functools.partial(future.set_exception, error)
            else:
                end = functools.partial(future.set_result, found)
            self._ended = time.monotonic()
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(end)

        threading.Thread(target=work, name="safelora-outside", daemon=True).start()
        return future
