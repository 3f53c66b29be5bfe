"""How many exams a tenant may cause: they take the engine's time, and a verdict tells its author a bit."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from safelora_vllm.errors import ExamUnavailable, SafeLoRAError

A_MINUTE, A_DAY = 6, 100
AT_ONCE = 2  # one that runs, and one that waits: each holds the place of an upload
_SOON_SECONDS = 5
_WINDOWS = ((60.0, A_MINUTE, "minute"), (86400.0, A_DAY, "day"))


class Limit(NamedTuple):
    """Exams that a tenant may cause. None: as many as all tenants may."""

    a_minute: int | None = None
    a_day: int | None = None


EVERYBODYS = Limit()


class TooManyExams(SafeLoRAError):
    """A tenant has had its share. seconds: after which it may try again."""

    def __init__(self, message: str, seconds: int = 1) -> None:
        super().__init__(message)
        self.seconds = seconds


class NoTurn(ExamUnavailable):
    """An exam did not begin, as others have not ended. It does not count."""


class ExamLimits:
    """The exams that each tenant caused in one API server process. An upload with all its rungs is one."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._times = now, defaultdict[str, deque[float]](deque)
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def share(self, tenant: str | None, limit: Limit = EVERYBODYS) -> Iterator[Callable[[], None]]:
        """What counts an exam, which ends with the block: once, however often it is called.

        Those of admins, and of the server itself, have no tenant and no bound. It raises TooManyExams, and
        counts nothing, over a limit. It is called before each part: where the first one has no turn, it does
        not count.
        """
        begun = 0

        def begin() -> None:
            nonlocal begun
            if tenant and not begun:
                if self._under_way[tenant] >= AT_ONCE:
                    raise TooManyExams(
                        f"{AT_ONCE} exams of the tenant are under way; try again in {_SOON_SECONDS} s",
                        _SOON_SECONDS,
                    )
                self._take(tenant, limit)
                self._under_way[tenant] += 1
            begun += 1

        try:
            yield begin
        except NoTurn:
            if tenant and begun == 1:
                self._times[tenant].pop()
            raise
        finally:
            if tenant and begun:
                self._under_way[tenant] -= 1
                self._under_way += Counter()  # forgets those that have none

    def _take(self, tenant: str, limit: Limit) -> None:
        now, times = self._now(), self._times[tenant]
        while times and now - times[0] >= _WINDOWS[-1][0]:
            times.popleft()
        for (seconds, everybodys, unit), own in zip(_WINDOWS, limit, strict=True):
            most = everybodys if own is None else own
            recent = [then for then in times if now - then < seconds]
            if len(recent) >= most:
                wait = int(seconds - (now - min(recent, default=now))) + 1
                raise TooManyExams(
                    f"the tenant has had its {most} exams of new content in a {unit}; try again in {wait} s",
                    wait,
                )
        times.append(now)
