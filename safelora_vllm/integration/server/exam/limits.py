"""How many exams a tenant may cause: they take the engine's time, and a verdict tells its author a bit."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable

from safelora_vllm.errors import SafeLoRAError
from safelora_vllm.tenants.principal import Principal

A_MINUTE, A_DAY = 6, 100
_WINDOWS = ((60.0, A_MINUTE, "minute"), (86400.0, A_DAY, "day"))


class TooManyExams(SafeLoRAError):
    """A tenant has had its share. seconds: after which it may try again."""

    def __init__(self, message: str, seconds: int = 1) -> None:
        super().__init__(message)
        self.seconds = seconds


class ExamLimits:
    """The exams that each tenant caused in one API server process. An upload with all its rungs is one."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._times = now, defaultdict[str, deque[float]](deque)

    def take(self, who: Principal | None) -> None:
        """Count an exam. Those of admins, and of the server itself, have no bound.

        Raises:
            TooManyExams: over a limit; it is not counted.
        """
        if who is None or who.tenant is None:
            return
        now, times = self._now(), self._times[who.tenant]
        while times and now - times[0] >= _WINDOWS[-1][0]:
            times.popleft()
        for seconds, most, unit in _WINDOWS:
            recent = [then for then in times if now - then < seconds]
            if len(recent) >= most:
                wait = int(seconds - (now - recent[0])) + 1
                raise TooManyExams(
                    f"the tenant has had its {most} exams of new content in a {unit}; try again in {wait} s",
                    wait,
                )
        times.append(now)
