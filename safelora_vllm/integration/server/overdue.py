"""What is served by former rules, and could not be judged by today's for too long.

It stays served while it waits for its turn, while the gate restarts, and while the engine is too busy for its
exam. But its author may see to it that this does not end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

LONGEST_SECONDS = 900.0


class Overdue:
    """Of one API server process. now: a clock that is never set, in seconds."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._last = now, now()  # the last: when anything was judged
        self._waiting: dict[str, float] = {}  # name → since when
        self._failed: dict[str, float] = {}  # name → when it failed first, of the times in a row

    def failed(self, name: str) -> None:
        """A try to judge it came to nothing."""
        self._failed.setdefault(name, self._now())

    def judged(self, name: str) -> None:
        """It was, whatever came out."""
        self._failed.pop(name, None)
        self._last = self._now()

    def look(self, waiting: Collection[str], scored: float) -> list[str]:
        """The names that have waited too long.

        One has if its own tries have failed for 15 minutes, or if in that time nothing was judged at all. A
        name that only waits behind others is not late.

        Args:
            waiting: all that are served by former rules.
            scored: when an exam last gave a score, by the same clock.
        """
        now = self._now()
        self._waiting = {name: self._waiting.get(name, now) for name in waiting}
        self._failed = {name: since for name, since in self._failed.items() if name in self._waiting}
        last = max(self._last, scored)
        return [
            name
            for name, since in self._waiting.items()
            if now - min(max(since, last), self._failed.get(name, now)) >= LONGEST_SECONDS
        ]
