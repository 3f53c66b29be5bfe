"""How many new versions a tenant may make: each takes ids of adapters, lines of the audit log, and a load."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable

from safelora_vllm.errors import SafeLoRAError

A_MINUTE, A_DAY = 60, 1000
_WINDOWS = ((A_MINUTE, 60.0, "minute"), (A_DAY, 86400.0, "day"))


class TooManyChanges(SafeLoRAError):
    """A tenant has had its share. seconds: after which it may try again."""

    def __init__(self, count: int, time_span: str, seconds: int) -> None:
        super().__init__(
            f"the tenant has made its {count:,} new versions in a {time_span}; try again in {seconds} s"
        )
        self.seconds = seconds


class ChangeLimit:
    """New versions of each tenant in one API server process: uploads and rollbacks of whatever content.

    What changes nothing is not counted. Nor are removals: a tenant can always take down what it has.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._times = defaultdict[str, deque[float]](lambda: deque(maxlen=A_DAY))

    def take(self, tenant: str | None) -> None:
        """Count a version. Those of admins have no tenant and no bound.

        Raises:
            TooManyChanges: it is not counted.
        """
        self.check(tenant)
        if tenant is not None:
            self._times[tenant].append(self._now())

    def check(self, tenant: str | None) -> None:
        """Whether one more would be counted.

        Raises:
            TooManyChanges: it would not.
        """
        if tenant is None:
            return
        now, times = self._now(), self._times[tenant]
        for count, seconds, time_span in _WINDOWS:
            if len(times) >= count and (age := now - times[-count]) < seconds:
                raise TooManyChanges(count, time_span, int(seconds - age) + 1)
