"""Bounds how many lines a tenant's repeated refusals make in the audit log."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

LINES, SECONDS = 10, 60.0


@dataclass(frozen=True)
class Refused:
    """What a line says. count: refusals that it stands for. details: of the audit record."""

    actor: str
    action: str
    adapter: str
    details: Mapping[str, Any]
    count: int = 1

    def and_those(self, before: Refused | None) -> Refused:
        """One line for this and the ones before: codes are of them all, the rest is of this."""
        codes, count = list(self.details["reasons"]), 1
        if before is not None:
            codes, count = list(dict.fromkeys([*before.details["reasons"], *codes])), before.count + 1
        details = {"decision": self.details["decision"], "reasons": codes}
        return Refused(self.actor, self.action, self.adapter, details, count)


class RefusalLimit:
    """Lines of each kind and tenant in one API server process: at most `LINES` in `SECONDS`, the rest as one.

    Nothing is counted twice. The count is written at the next refusal after the time, and by `flush`.
    """

    def __init__(self, write: Callable[[Refused], Awaitable[None]]) -> None:
        self._write = write
        self._began: dict[str, float] = {}
        self._lines: dict[str, int] = {}
        self._more: dict[str, Refused] = {}

    async def refused(self, whose: str, refusal: Refused) -> None:
        """Write a line, or count the refusal. whose: the kind and the tenant that are bounded together."""
        await self.flush()
        if whose not in self._began:
            self._began[whose], self._lines[whose] = time.monotonic(), 0
        self._lines[whose] += 1
        if self._lines[whose] <= LINES:
            await self._write(refusal)
        else:
            self._more[whose] = refusal.and_those(self._more.get(whose))

    async def flush(self, all_of_them: bool = False) -> None:
        """Write the counts whose time is over, or all."""
        now = time.monotonic()
        for whose, began in list(self._began.items()):
            over = all_of_them or now - began >= SECONDS
            if over and self._began.get(whose) == began:  # nobody else wrote it while we did another
                del self._began[whose], self._lines[whose]
                if more := self._more.pop(whose, None):
                    await self._write(more)
