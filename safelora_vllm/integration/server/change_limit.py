"""How many new versions a tenant may make: each takes ids of adapters, lines of the audit log, and a load."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable

from safelora_vllm.errors import SafeLoRAError

A_MINUTE, _SECONDS = 60, 60.0


class TooManyChanges(SafeLoRAError):
    """A tenant has had its share. seconds: after which it may try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(
            f"the tenant has made its {A_MINUTE} new versions in a minute; try again in {seconds} s"
        )
        self.seconds = seconds


class ChangeLimit:
    """New versions of each tenant in one API server process: uploads and rollbacks of whatever content.

    What changes nothing is not counted. Nor are removals: a tenant can always take down what it has.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._times = now, defaultdict[str, deque[float]](deque)

    def take(self, tenant: str | None) -> None:
        """Count a version. Those of admins have no tenant and no bound.

        Raises:
            TooManyChanges: it is not counted.
        """
        if tenant is None:
            return
        now, times = self._now(), self._times[tenant]
        while times and now - times[0] >= _SECONDS:
            times.popleft()
        if len(times) >= A_MINUTE:
            raise TooManyChanges(int(_SECONDS - (now - times[0])) + 1)
        times.append(now)
