"""How many exams there were and how long they took, of all API servers of a host."""

from __future__ import annotations

import contextlib
import json
import os
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from safelora_vllm.gate.socket_folder import EXAMS as FILES

BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)  # seconds
_GUESS_SECONDS = 30.0
# With an opinion: the score alone would have failed.
PASSED, PASSED_WITH_OPINION, FAILED, UNAVAILABLE = "passed", "passed_with_opinion", "failed", "unavailable"
VERDICTS = (PASSED, PASSED_WITH_OPINION, FAILED, UNAVAILABLE)


@dataclass
class Counted:
    """exams: by verdict and rung. buckets: of `BUCKETS`, the last without a bound. seconds: their sum."""

    exams: Counter[tuple[str, str]] = field(default_factory=Counter)
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    seconds: float = 0.0

    def add(self, other: Counted) -> None:
        """Count what another process did."""
        self.exams += other.exams
        self.buckets = [one + more for one, more in zip(self.buckets, other.buckets, strict=True)]
        self.seconds += other.seconds


class Counts:
    """Written to a file of this process in a folder that all API servers of a host have."""

    def __init__(self, folder: Path) -> None:
        self._own, self._file = Counted(), folder / FILES.replace("*", str(os.getpid()))

    def count(self, verdict: str, rung: str, seconds: float) -> None:
        """Count an exam. A file that cannot be written ends none."""
        self._own.exams[verdict, rung] += 1
        self._own.buckets[bisect_left(BUCKETS, seconds)] += 1
        self._own.seconds += seconds
        exams = [[*labels, count] for labels, count in self._own.exams.items()]
        text = json.dumps({"exams": exams, "buckets": self._own.buckets, "seconds": self._own.seconds})
        with contextlib.suppress(OSError):
            new = self._file.with_name(f".{self._file.name}")
            new.write_text(text)
            new.rename(self._file)

    @property
    def usual_seconds(self) -> float:
        """How long an exam of this process takes, on average; a guess before the first one."""
        exams = self._own.exams.total()
        return self._own.seconds / exams if exams else _GUESS_SECONDS

    def all(self) -> Counted:
        """Of all processes. What cannot be read is left out."""
        found = Counted()
        for file in self._file.parent.glob(FILES):
            if file != self._file:
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                    data = json.loads(file.read_text())
                    exams = Counter({(verdict, rung): count for verdict, rung, count in data["exams"]})
                    found.add(Counted(exams, data["buckets"], data["seconds"]))
        found.add(self._own)
        return found
