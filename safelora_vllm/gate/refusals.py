"""What the gate keeps of refusals: lines of the audit log, and the newest by content and rules."""

from __future__ import annotations

import logging
import threading

from safelora_vllm.errors import StoreUnavailable
from safelora_vllm.gate.admit import GateSettings
from safelora_vllm.gate.protocol import Judgement
from safelora_vllm.report import Report
from safelora_vllm.store.audit_log import SERVER, AuditLog, audit_fields

logger = logging.getLogger("vllm.safelora.gate")
_REMEMBERED = 256


class Refusals:
    """The newest refusals of stored content. Safe for several threads.

    Each API server asks for the same content after a start: by the same rules it is refused again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, Judgement] = {}

    def find(self, key: str, name: str) -> Judgement | None:
        """What was refused by a key, under the name that is asked for now."""
        with self._lock:
            found = self._known.get(key)
        return found and Judgement(found.report.named(name), None, found.bytes, found.ruleset_digest)

    def add(self, key: str, refused: Judgement) -> None:
        """Remember one, and forget the oldest where there are too many."""
        with self._lock:
            self._known[key] = refused
            while len(self._known) > _REMEMBERED:
                self._known.pop(next(iter(self._known)))


def log_refusal(audit: AuditLog, name: str, report: Report, settings: GateSettings) -> None:
    """Of a folder that no caller sent: vLLM's server ends then, so that nobody else can say it."""
    once = f"refused {settings.key(report.digest)}"
    try:
        audit.record(SERVER, "load", name, once=once, **audit_fields(report, "refused"))
    except StoreUnavailable as error:
        logger.error("%s", error)
