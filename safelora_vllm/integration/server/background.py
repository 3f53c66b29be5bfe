"""Work that no request waits for, and threads for work that may take long."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

logger = logging.getLogger("vllm.safelora")
# asyncio has a few threads for the short calls. A store with a bucket, and a hub, may take minutes.
STORE = ThreadPoolExecutor(8, thread_name_prefix="safelora-store")
HUB = ThreadPoolExecutor(8, thread_name_prefix="safelora-hub")
_T = TypeVar("_T")


async def in_thread(threads: ThreadPoolExecutor, work: Callable[..., _T], *arguments: object) -> _T:
    """As `asyncio.to_thread`, in other threads."""
    run = functools.partial(contextvars.copy_context().run, work, *arguments)
    return await asyncio.get_running_loop().run_in_executor(threads, run)


class Background:
    """Tasks of one API server process that end with it."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin it."""
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("work in the background ended by an error", exc_info=error)

    async def stop(self) -> None:
        """End all of it."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
