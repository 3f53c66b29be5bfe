"""How often an adapter that cannot be served is tried again, and when that is logged."""

from __future__ import annotations

import time
from collections.abc import Container
from dataclasses import dataclass

_FIRST_SECONDS, _LONGEST_SECONDS = 2.0, 30.0


@dataclass(frozen=True)
class _Failure:
    """The last one of a name. pause: seconds until the next try, which is at ``due`` (monotonic clock)."""

    message: str
    pause: float
    due: float


class Retries:
    """The failures of names.

    The first try again has no pause. Then the pause doubles from 2 s to 30 s, until the cause is another one.
    """

    def __init__(self) -> None:
        self._failures: dict[str, _Failure] = {}

    def is_due(self, name: str) -> bool:
        """Whether a name may be tried now."""
        failure = self._failures.get(name)
        return failure is None or time.monotonic() >= failure.due

    def failed(self, name: str, message: str) -> bool:
        """Note a failure. Whether its cause is another one than before, and so worth a line in the log."""
        before = self._failures.get(name)
        known = before is not None and before.message == message
        pause = min(max(2 * before.pause, _FIRST_SECONDS), _LONGEST_SECONDS) if before and known else 0.0
        self._failures[name] = _Failure(message, pause, time.monotonic() + pause)
        return not known

    def served(self, name: str) -> bool:
        """Forget a name that is served. Whether it had failed before."""
        return self._failures.pop(name, None) is not None

    def keep(self, names: Container[str]) -> None:
        """Forget names that are gone."""
        self._failures = {name: failure for name, failure in self._failures.items() if name in names}
