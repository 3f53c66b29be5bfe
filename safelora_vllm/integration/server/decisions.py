"""What the audit log says of a decision about an adapter."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any, NamedTuple

from safelora_vllm.errors import SafeLoRAError
from safelora_vllm.store import Version
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.store.verdicts import Examined

logger = logging.getLogger("vllm.safelora.management")
BY_THE_KEYS_FILE = "less_strict in the keys file"


async def log(audit: AuditLog, actor: str, action: str, name: str, **details: Any) -> None:
    """Record what was done. A log that cannot be written undoes nothing."""
    try:
        await asyncio.to_thread(audit.record, actor, action, name, **details)
    except SafeLoRAError as error:  # the change itself is made: say so loudly
        about = {"adapter": name, "version": details.get("version")}
        logger.error("%s of %r by %s is not in the audit log: %s", action, name, actor, error, extra=about)


def exam_fields(found: Examined | None) -> dict[str, Any]:
    """What an exam found of the copy that was accepted; nothing where there was none."""
    if found is None:
        return {}
    more = {"seconds": found.seconds, "over_refusal": found.over_refusal}
    return {"exam": {**dataclasses.asdict(found.score), **more}}


class Failed(NamedTuple):
    """A rung on which an adapter failed. threshold: nats per token. again: by the held-out probes."""

    rung: str
    found: Examined
    threshold: float
    again: bool

    @property
    def fields(self) -> dict[str, Any]:
        """For the audit log, and for admins."""
        figures = dataclasses.asdict(self.found.score)
        return {"rung": self.rung, **figures, "threshold": self.threshold, "again": self.again}


def version_fields(version: Version, override: bool) -> dict[str, Any]:
    """Of a version that is served or was refused. override: its rules are less strict than the server's."""
    reason = BY_THE_KEYS_FILE if override and not version.override else ""
    examined = {"exam_override": True} if version.exam_override else {}
    return {
        "version": version.version,
        "override": override or version.override,
        **examined,
        "reason": version.reason or reason,
        "ruleset": version.ruleset_digest,
        "published": version.key,
    }
