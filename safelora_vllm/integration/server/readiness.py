"""Whether a server is to get traffic: every worker guarded, the projectors verified, the store writable."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from safelora_vllm.errors import SafeLoRAError

if TYPE_CHECKING:
    from safelora_vllm.integration.server.reconcile import Reconciler

_GATE_SECONDS = 5.0


class Readiness(BaseModel):
    """The answer of ``GET /safelora/ready``. It names no paths: everybody may ask."""

    ready: bool
    problems: list[str] = Field(description="in words; none where the server is ready")


def problems(reconciler: Reconciler, expected: int) -> list[str]:
    """Why this server should get no traffic. Waits for the gate and for the store's disk.

    Args:
        reconciler: of this API server.
        expected: workers that there are to be; 0 where that is not known.
    """
    found = []
    guarded = reconciler.watchdog.workers.get("guarded", 0)
    if reconciler.watchdog.workers.get("unguarded") or guarded < max(expected, 1):
        found.append(f"{guarded} of {expected or 'all'} workers are guarded")
    try:
        state = reconciler.copies.gate.state(timeout=_GATE_SECONDS)
    except SafeLoRAError:
        found.append("the gate does not answer: projectors are not verified and uploads answer 503")
    else:  # a gate answers once it has read and verified the whole cache
        if state.projectors != reconciler.copies.state.projectors:
            found.append("the gate has other projectors than the workers were started with")
    if not _writable(reconciler.names.root):
        found.append("the adapter store is not writable")
    return found


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
