"""Times as settings and options have them: 90s, 15m, 24h, 7d long, or ago, and dates."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from safelora_vllm.errors import UsageError

_LENGTH = re.compile(r"([0-9]+)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DIGITS = 9  # of a setting


def seconds_in(text: str) -> int:
    """So many seconds.

    Raises:
        UsageError: the text is not a number and a unit, or nothing.
    """
    found = _LENGTH.fullmatch(text)
    if found is None or len(found[1]) > _DIGITS or int(found[1]) == 0:
        raise UsageError(
            f"{text!r:.60} is not a valid duration: expected a number above 0 and a unit, such as 90s, 15m, "
            "24h or 7d"
        )
    return _seconds(found)


def parse_since(text: str) -> datetime:
    """A time from "90s", "15m", "2h" or "7d" (ago), or an ISO date or time (UTC if it does not say).

    Raises:
        UsageError: it is neither.
    """
    try:
        if ago := _LENGTH.fullmatch(text):
            return datetime.now(UTC) - timedelta(seconds=_seconds(ago))
        time = datetime.fromisoformat(text)
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise UsageError(
            f"{text!r:.60} is not a valid time: expected 90s, 15m, 2h or 7d for so long ago, or a date or "
            "time like 2026-01-31 or 2026-01-31T12:00:00Z"
        ) from None


def _seconds(found: re.Match[str]) -> int:
    return int(found[1]) * _SECONDS[found[2]]
