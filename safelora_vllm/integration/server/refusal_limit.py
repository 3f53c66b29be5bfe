"""Bounds how many lines a tenant's repeated refusals make in the audit log."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

LINES, SECONDS = 10, 60.0


class RefusalLimit:
    """Lines of each tenant in one API server process: at most `LINES` in `SECONDS`, the rest as one count.

    Nothing is counted twice. The count is written at the next refusal after the time, and by `flush`.
    """

    def __init__(self, write: Callable[[str, str, str, int], Awaitable[None]]) -> None:
        """write: a line that stands for so many refusals: actor, action, adapter, count."""
        self._write = write
        self._began: dict[str, float] = {}
        self._lines: dict[str, int] = {}
        self._more: dict[str, tuple[str, str, str, int]] = {}

    async def refused(self, tenant: str, actor: str, action: str, adapter: str) -> None:
        """Write a line, or count the refusal. A count has the last one's actor, action and adapter."""
        await self.flush()
        if tenant not in self._began:
            self._began[tenant], self._lines[tenant] = time.monotonic(), 0
        self._lines[tenant] += 1
        if self._lines[tenant] <= LINES:
            await self._write(actor, action, adapter, 1)
        else:
            _, _, _, count = self._more.get(tenant, ("", "", "", 0))
            self._more[tenant] = (actor, action, adapter, count + 1)

    async def flush(self, all_of_them: bool = False) -> None:
        """Write the counts whose time is over, or all."""
        now = time.monotonic()
        for tenant, began in list(self._began.items()):
            over = all_of_them or now - began >= SECONDS
            if over and self._began.get(tenant) == began:  # nobody else wrote it while we did another
                del self._began[tenant], self._lines[tenant]
                if more := self._more.pop(tenant, None):
                    await self._write(*more)
