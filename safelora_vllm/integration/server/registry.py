"""What one API server process knows of each adapter's name: one entry, of which all else is a view.

vLLM's map of names (`visibility`), ``/v1/adapters``, ``/v1/models`` and ``/metrics`` read these entries;
`reconcile` writes them.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from safelora_vllm.errors import AdapterRefused, ExamUnavailable, GateUnavailable, SafeLoRAError, fresh_copy
from safelora_vllm.files import FileState
from safelora_vllm.integration.adapter_uri import published_key
from safelora_vllm.report import Report
from safelora_vllm.store import Version

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

State = Literal["served", "refused", "unavailable"]


@dataclass(frozen=True)
class Served:
    """An adapter's weights as they are served.

    request: what vLLM is given. report: the gate's. copy: states of the published files when they were last
    looked at.
    """

    request: LoRARequest
    report: Report
    copy: tuple[FileState, ...] = ()

    @property
    def key(self) -> str:
        """Of the published copy."""
        return published_key(self.request.lora_path)

    @cached_property
    def figures(self) -> dict[str, float | int | None]:
        """Over all modules; kept, as every look at the page asks for those of all adapters."""
        report = self.report
        return {
            "modules": len(report.modules),
            "projected": report.count("projected"),
            "least_retained": min(report.values("retained"), default=None),
            "total_norm": report.total_norm,
        }


@dataclass(frozen=True)
class Entry:
    """A name.

    first_id: of the numbers by which vLLM knows its weights. version: what the store has under it; None for
    ``--lora-modules``. folder: of ``--lora-modules``. served: None while it cannot be served. problem: why
    it cannot.
    """

    name: str
    first_id: int
    version: Version | None = None
    folder: Path | None = None
    served: Served | None = None
    problem: SafeLoRAError | None = None

    @property
    def load_seconds(self) -> float:
        """From the request to change the name until it was changed; 0 for ``--lora-modules``."""
        return self.version.load_seconds if self.version else 0.0

    @property
    def exam_override(self) -> bool:
        """Whether an admin has it served whatever its exam says."""
        return self.version is not None and self.version.exam_override

    @property
    def refusal(self) -> AdapterRefused | None:
        """Of today's rules; None where it is served, or is not for another reason."""
        return self.problem if self.served is None and isinstance(self.problem, AdapterRefused) else None

    @property
    def state(self) -> State:
        """In a word."""
        return "served" if self.served else "refused" if self.refusal else "unavailable"

    @property
    def log_fields(self) -> dict[str, object]:
        """What a line of the log says of its adapter, as `extra`."""
        return {"adapter": self.name, "version": self.version and self.version.version}

    def current(self) -> Served:
        """What is served.

        Raises:
            SafeLoRAError: why it cannot be served now, a new exception each time.
        """
        if self.served is None:
            raise fresh_copy(self.problem) if self.problem else being_prepared(self.name)
        return self.served


Registry = dict[str, Entry]
WAITS = "waits for its exam: adapters are examined one after the other"
_SOON_SECONDS, _LATE_SECONDS = 5, 600  # bounds of what a caller is told to wait


class AwaitsExam(ExamUnavailable):
    """The answer while an adapter waits for its exam. message: what waits, and for what."""

    _due = 0.0

    @classmethod
    def within(cls, name: str, seconds: float) -> AwaitsExam:
        """seconds: until its turn ends, as far as that can be foreseen."""
        made = cls(f"{name} {WAITS}; try again when `Retry-After` has passed")
        made._due = time.monotonic() + seconds
        return made

    @property
    def seconds(self) -> int:
        """For ``Retry-After``."""
        return min(max(math.ceil(self._due - time.monotonic()), _SOON_SECONDS), _LATE_SECONDS)


def why_unavailable(problem: SafeLoRAError | None) -> str:
    """What tenants are told of an adapter that is neither served nor refused."""
    if isinstance(problem, AwaitsExam):
        return f"it {WAITS}"
    return "it is being prepared; try again in a moment"


def being_prepared(name: str) -> GateUnavailable:
    """The answer while the gate makes or finds the published copy."""
    return GateUnavailable(f"{name} is being prepared; try again in a moment")
