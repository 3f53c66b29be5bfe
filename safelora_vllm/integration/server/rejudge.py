"""Judging what is stored by the rules of today, and keeping what was decided in the adapter's record.

All servers of a store read the record, so that they agree, and the one that wrote it writes the audit log:
a decision is there once.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import Any

from safelora_vllm.errors import AdapterRefused, codes_of
from safelora_vllm.integration.server.background import STORE, in_thread
from safelora_vllm.integration.server.decisions import exam_fields, version_fields
from safelora_vllm.integration.server.engine import Pool
from safelora_vllm.integration.server.published_copies import Copies, Copy, Judged
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.store_sync import same_content
from safelora_vllm.store import AdapterRecord, Version
from safelora_vllm.store.audit_log import REJUDGE, SERVER, AuditLog, audit_fields
from safelora_vllm.store.recorded import Line, RecordedNames

logger = logging.getLogger("vllm.safelora.reconcile")


class Rejudge:
    """Decisions that no caller asked for. copies: asks the gate. pool: loads what is served already."""

    def __init__(self, copies: Copies, pool: Pool, audit: AuditLog) -> None:
        self._copies, self._pool = copies, pool
        self._recorded = RecordedNames(pool.names, audit)

    async def decide(self, entry: Entry, version: Version) -> Copy | None:
        """Let the gate judge a stored version by today's rules.

        Returns:
            Its copy, where the record says the same already. None where the record has changed.

        Raises:
            AdapterRefused: refused, as the record says already. SafeLoRAError: the gate or the store cannot.
        """
        judged = await self._copies.ensure_version(entry.name, version)
        judged = judged.signed(version.signed_by)
        reasons = tuple(judged.report.reasons) if judged.judgement.key is None else ()
        key = judged.judgement.key or ""
        decided = (judged.ruleset, key, codes_of(reasons))
        if decided == (version.ruleset_digest, version.key, codes_of(version.refused)):
            return await self._copies.copy_of(entry, judged.judgement)
        new = dataclasses.replace(
            version,
            key=key,
            ruleset_digest=judged.ruleset,
            id=await self._pool.new_id(),
            refused=reasons,
            judged=time.time(),
        )
        if key and entry.served is not None:
            new = await self._loaded(entry.name, new, judged)
        decision = "refused" if new.refused else "accepted"
        fields = audit_fields(self._copies.shown(judged.report), decision)
        fields["reasons"] = codes_of(new.refused)
        examined = judged.exam_fields or exam_fields(self._copies.exam.found(key))
        details = fields | version_fields(new, judged.override) | examined
        if not await self._write(entry.name, version, new, details):
            if new.key and entry.served is not None:
                await self._pool.release(self._pool.request(entry.name, key, new.id), wanted=lambda _: False)
        else:
            about = {"adapter": entry.name, "version": new.version}
            logger.info(
                "adapter %r was judged anew by the rules of today: %s", entry.name, decision, extra=about
            )
        return None

    async def _loaded(self, name: str, new: Version, judged: Judged) -> Version:
        """The version when the workers have its weights, so that no request waits for them; or refused."""
        try:
            await self._pool.load(self._pool.request(name, new.key, new.id), judged.judgement.bytes)
        except AdapterRefused as error:
            return dataclasses.replace(new, key="", refused=tuple(error.reasons))
        return new

    async def _write(self, name: str, old: Version, new: Version, details: dict[str, Any]) -> bool:
        """Put what was decided into the record, unless somebody has changed it. Whether it was done."""
        written = False
        # What another host has decided by its own rules meanwhile is of the same version. Where the rules
        # here are others by now, this decision is old.
        is_todays = new.ruleset_digest == self._copies.ruleset(name)

        def change(record: AdapterRecord | None) -> AdapterRecord | None:
            nonlocal written
            written = record is not None and (
                record.live == old or (is_todays and _by_other_rules(record.live, old, new))
            )
            return record.with_live(new) if written and record else record

        line = Line(SERVER, REJUDGE, lambda _: details)
        await in_thread(STORE, self._recorded.update, name, change, line)
        return written


def _by_other_rules(found: Version, old: Version, new: Version) -> bool:
    return same_content(found, old) and found.ruleset_digest != new.ruleset_digest
