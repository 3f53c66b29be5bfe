"""How often an adapter that cannot be served is tried again, and when that is logged."""

from __future__ import annotations

import time
from dataclasses import dataclass

_FIRST_SECONDS, _LONGEST_SECONDS = 2.0, 60.0


@dataclass(frozen=True)
class _Failure:
    """The last one of a name. pause: seconds until the next try, which is at ``due`` (monotonic)."""

    message: str
    pause: float
    due: float


class Retries:
    """The failures of names. The pause doubles from 2 s to a minute, and starts anew with another cause."""

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
        pause = min(2 * before.pause, _LONGEST_SECONDS) if before and known else _FIRST_SECONDS
        self._failures[name] = _Failure(message, pause, time.monotonic() + pause)
        return not known

    def served(self, name: str) -> bool:
        """Forget a name that is served, or gone. Whether it had failed before."""
        return self._failures.pop(name, None) is not None
