"""Whether a server is to get traffic: every worker guarded. What else is out of order: gate, store, keys."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from safelora_vllm.errors import SafeLoRAError
from safelora_vllm.integration.server.one_at_a_time import OneAtATime

if TYPE_CHECKING:
    from safelora_vllm.integration.server.reconcile import Reconciler

_GATE_SECONDS, _SECONDS, _KEPT_SECONDS = 5.0, 6.0, 1.0
SILENT = "the gate or the store does not answer"
_SILENT_KEYS = "the keys file cannot be looked at: its disk does not answer"


class Readiness(BaseModel):
    """The answer of ``GET /safelora/ready``. It names no paths: everybody may ask."""

    ready: bool
    problems: list[str] = Field(description="why it is not ready, in words; none where it is")
    warnings: list[str] = Field(
        description="what is out of order and stops no adapter that is served; problems with ?strict=true"
    )


@dataclass(frozen=True)
class Findings:
    """problems: why this server should get no traffic. warnings: what else is out of order."""

    problems: list[str]
    warnings: list[str]

    def answer(self, strict: bool) -> Readiness:
        """strict: what stops changes counts too."""
        if strict:
            problems = [*self.problems, *self.warnings]
            return Readiness(ready=not problems, problems=problems, warnings=[])
        return Readiness(ready=not self.problems, problems=self.problems, warnings=self.warnings)


class ReadinessCheck:
    """The check of one API server process.

    expected: workers that there are to be; 0 where that is not known. keys_current: whether the keys in force
    are those of the keys file; None without one.
    """

    def __init__(
        self, reconciler: Reconciler, expected: int, keys_current: Callable[[], bool] | None = None
    ) -> None:
        self._reconciler, self._expected, self._keys_current = reconciler, expected, keys_current
        self._outside = OneAtATime(self._gate_and_store, _SECONDS, _KEPT_SECONDS)
        self._keys = OneAtATime(self._keys_file, _SECONDS, _KEPT_SECONDS)

    async def findings(self) -> Findings:
        """What is out of order. Waits at most 6 s for the gate and for the disks of store and keys file."""
        outside, keys = await asyncio.gather(_found(self._outside, SILENT), _found(self._keys, _SILENT_KEYS))
        return Findings(self._workers(), [*outside, *keys])

    def _workers(self) -> list[str]:
        workers = self._reconciler.watchdog.workers
        guarded = workers.get("guarded", 0)
        if workers.get("unguarded") or guarded < max(self._expected, 1):
            return [f"{guarded} of {self._expected or 'all'} workers are guarded"]
        return []

    def _gate_and_store(self) -> list[str]:
        found, copies = [], self._reconciler.copies
        try:
            state = copies.gate.state(timeout=_GATE_SECONDS)
        except SafeLoRAError:
            found.append("the gate does not answer: projectors are not verified and uploads answer 503")
        else:  # a gate answers once it has read and verified the whole cache
            if state.projectors != copies.state.projectors:
                found.append("the gate has other projectors than the workers were started with")
        if not _writable(self._reconciler.names.root):
            found.append("the adapter store is not writable")
        if self._reconciler.names.is_out:
            found.append("the store's bucket does not answer: changes answer 503")
        return found

    def _keys_file(self) -> list[str]:
        """Apart from the gate: one that hangs hides nothing of the keys."""
        if self._keys_current is None or self._keys_current():
            return []
        return ["the keys file cannot be used: keys that were removed from it still work"]


async def _found(look: OneAtATime[list[str]], silent: str) -> list[str]:
    try:
        return await look.answer()
    except TimeoutError:
        return [silent]


def _writable(root: Path) -> bool:
    file = root / f".ready-{os.getpid()}"
    try:
        file.write_bytes(b"1")
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    return True
