"""Lengths of time as settings have them: 90s, 15m, 24h, 7d."""

from __future__ import annotations

import re

from safelora_vllm.errors import UsageError

_DURATION = re.compile(r"([0-9]{1,9})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_in(text: str) -> int:
    """So many seconds.

    Raises:
        UsageError: the text is not a number and a unit, or nothing.
    """
    found = _DURATION.fullmatch(text)
    if found is None or int(found[1]) == 0:
        raise UsageError(
            f"{text!r:.60} is not a valid duration: expected a number above 0 and a unit, such as 90s, 15m, "
            "24h or 7d"
        )
    return int(found[1]) * _SECONDS[found[2]]
