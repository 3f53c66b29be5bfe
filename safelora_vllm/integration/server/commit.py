"""The frame of every change: one at a time of a name, and from what was judged to what is served.

What fails before the store's name is changed leaves everything as it was.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

from safelora_vllm.errors import (
    AdapterRefused,
    AlreadyLoaded,
    ChangedMeanwhile,
    Forbidden,
    QuotaExceeded,
    SafeLoRAError,
    UsageError,
)
from safelora_vllm.integration.server.background import STORE, in_thread
from safelora_vllm.integration.server.callers import caller_now
from safelora_vllm.integration.server.change_limit import ChangeLimit
from safelora_vllm.integration.server.decisions import exam_fields, log, version_fields
from safelora_vllm.integration.server.published_copies import Judged
from safelora_vllm.integration.server.reconcile import Reconciler
from safelora_vllm.integration.server.refusal_limit import SECONDS, RefusalLimit, Refused
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.repeated import LOAD, live_number
from safelora_vllm.integration.server.tracing import span
from safelora_vllm.integration.server.visibility import check_visible, unknown
from safelora_vllm.store import AdapterRecord, Version
from safelora_vllm.store.audit_log import EXAM, AuditLog, audit_fields
from safelora_vllm.store.recorded import Line, RecordedNames
from safelora_vllm.tenants.keyless import NO_KEYS_FILE
from safelora_vllm.tenants.principal import Principal
from safelora_vllm.tenants.quotas import check_quota

logger = logging.getLogger("vllm.safelora.management")
Change = Callable[[AdapterRecord | None], AdapterRecord | None]


class Commits:
    """Makes what was judged the newest version of a name, in one API server process."""

    def __init__(self, reconciler: Reconciler, audit: AuditLog) -> None:
        self._reconciler, self._audit = reconciler, audit
        self._recorded = RecordedNames(reconciler.names, audit)
        self._refusals, self._limit = RefusalLimit(self._write_refusal), ChangeLimit()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def changing(
        self, who: Principal, name: str, action: str, waits: bool = True
    ) -> AsyncIterator[float]:
        """One change of a name at a time in this process, from the moment that it gives on.

        waits: for the others. What takes something away does not: an upload may be examined for an hour, and
        ends with `ChangedMeanwhile` then. What a quota stops goes to the audit log.
        """
        check_visible(who, name)  # before the lock: waiting for it would tell that there is such a name
        if self._reconciler.store.passed_over.get(name) == NO_KEYS_FILE:
            raise UsageError(f"adapter {name!r} cannot be changed by this server: {NO_KEYS_FILE}")
        lock = self._locks.setdefault(name, asyncio.Lock())
        async with lock if waits else nullcontext():
            try:
                with span(action, adapter=name):
                    yield time.perf_counter()
            except QuotaExceeded as error:
                if who.tenant is not None:
                    await self.refused(who, action, name, "quota", decision="refused", reasons=["quota"])
                raise QuotaExceeded(
                    f"{error}. What counts are the names {who.tenant}/...; GET /v1/usage lists them"
                ) from None

    async def count_refusals(self) -> None:
        """Without end: write the counts of refusals that were not written one by one."""
        try:
            while True:
                await asyncio.sleep(SECONDS)
                await self._refusals.flush()
        finally:  # the server stops
            await self._refusals.flush(all_of_them=True)

    async def refused(self, who: Principal, action: str, name: str, kind: str, **details: Any) -> None:
        """Record what changed nothing: many of one tenant, or repeated loads, as one with their count."""
        refusal = Refused(who.key_id, action, name, details)
        if who.tenant is None and action != LOAD:
            await self._write_refusal(refusal)
        else:  # controllers repeat their loads
            await self._refusals.refused(f"{kind} {who.tenant or name}", refusal)

    async def _write_refusal(self, refusal: Refused) -> None:
        more = {"count": refusal.count} if refusal.count > 1 else {}
        actor, action, adapter = refusal.actor, refusal.action, refusal.adapter
        await log(self._audit, actor, action, adapter, **refusal.details, **more)

    async def record(self, name: str) -> AdapterRecord | None:
        """The record of a name as all servers know it, None where there is none."""
        return await in_thread(STORE, self._reconciler.names.newest, name)

    async def known(self, who: Principal, name: str) -> AdapterRecord:
        """The record of a name that the caller may change.

        Raises:
            UnknownAdapter, Forbidden.
        """
        check_visible(who, name)
        record = await self.record(name)
        if record is None:
            raise unknown(name)
        if not who.may_manage(name):
            raise Forbidden(f"this key may use {name}, but not change it")
        return record

    async def check_accepted(
        self, who: Principal, name: str, action: str, judged: Judged, override: bool = False, reason: str = ""
    ) -> None:
        """A refusal goes to the audit log and to the caller."""
        if not judged.report.accepted:
            asked = {"override": override or judged.override, "reason": reason, "ruleset": judged.ruleset}
            asked = {field: value for field, value in asked.items() if value} | judged.exam_fields
            await self.refused(who, action, name, "gate", **self._told(judged, "refused"), **asked)
            raise AdapterRefused(judged.report.reasons, judged.exam_fields)

    async def unchanged(self, who: Principal, name: str, action: str, judged: Judged) -> None:
        """Say in the audit log that a name was to be replaced by what it serves."""
        live = live_number(self._reconciler, name)
        found = self._told(judged, "unchanged")
        by = {"ruleset": judged.ruleset, "published": judged.judgement.key}
        await self.refused(who, action, name, "unchanged", **found, **by, version=live)

    async def commit(
        self,
        who: Principal,
        name: str,
        action: str,
        judged: Judged,
        before: AdapterRecord | None,
        new: Version,
        start: float,
        earlier: Version | None = None,
    ) -> Entry:
        """Load what was judged and make it the newest version of what ``before`` still is.

        earlier: that a rollback goes back to, counted by `count` already.

        Raises:
            TooManyChanges: of the tenant. Unauthorized: the caller's key is not in force any more.
        """
        if earlier is None:
            self.count(who)
        pool = self._reconciler.pool
        new = dataclasses.replace(new, id=await pool.new_id())
        request = pool.request(name, new.key, new.id)
        try:
            await pool.load(request, judged.judgement.bytes)
        except AdapterRefused as error:
            refused = {**self._told(judged, "refused"), "reasons": error.codes, "ruleset": judged.ruleset}
            await self.refused(who, action, name, "gate", **refused)
            raise
        with span("swap", adapter=name):
            try:
                timed = dataclasses.replace(new, load_seconds=time.perf_counter() - start)

                def details(record: AdapterRecord | None) -> dict[str, Any]:
                    live = record.live if record else timed
                    examined = exam_fields(self._reconciler.copies.exam.found(new.key))
                    accepted = self._told(judged, "accepted")
                    return {**version_fields(live, judged.override), **accepted, **examined}

                line = Line(who.key_id, action, details)
                await in_thread(STORE, self.update, caller_now(who), name, before, timed, line, earlier)
            except SafeLoRAError:
                await pool.release(request, wanted=lambda _: False)
                raise
            await self._reconciler.sync()
        entry = self._reconciler.registry.get(name)
        if entry is None:  # removed by somebody who did not wait
            await pool.release(request, wanted=lambda _: False)
            raise changed_meanwhile(name)
        try:
            await self._reconciler.again.judge_if_marked(name)
        except SafeLoRAError as error:  # the change is made; the next exam of the tenant notes it again
            told = "whether adapter %r is to be examined again is not known: %s"
            logger.error(told, name, error, extra=entry.log_fields)
        entry.current()
        return entry

    def check_share(self, who: Principal) -> None:
        """Whether the caller's tenant may make a new version, before the work for it.

        Raises:
            TooManyChanges: it has had its share.
        """
        self._limit.check(who.tenant)

    def count(self, who: Principal) -> None:
        """Count a new version of the caller's tenant.

        Raises:
            TooManyChanges: it has had its share.
        """
        self._limit.take(who.tenant)

    def _told(self, judged: Judged, decision: str) -> dict[str, Any]:
        """What the audit log is told of what was judged."""
        return audit_fields(self._reconciler.copies.shown(judged.report), decision)

    def update(
        self,
        who: Principal,
        name: str,
        before: AdapterRecord | None,
        new: Version,
        line: Line,
        earlier: Version | None = None,
    ) -> None:
        """Add a version to a name's record, if that serves what it served ``before``, and has ``earlier``.

        Raises:
            AlreadyLoaded, ChangedMeanwhile, QuotaExceeded, SafeLoRAError: the store cannot be changed.
        """

        def change(record: AdapterRecord | None) -> AdapterRecord:
            """Under the store's lock: two servers cannot exceed a quota together, nor undo each other."""
            if (record and record.live.unjudged) != (before and before.live.unjudged):
                if before is None:
                    raise taken(name)
                raise changed_meanwhile(name)
            if record and earlier and earlier.unjudged not in record.unjudged.versions:
                raise changed_meanwhile(name)
            made = dataclasses.replace(new, apart=self._reconciler.store.apart)
            after = (record or AdapterRecord(name)).with_version(made)
            check_quota(self._reconciler.names, who, after)
            return after

        self._recorded.update(name, change, line)

    async def take_back_override(self, who: Principal, name: str, live: Version, reason: str) -> None:
        """Withdraw what is served by an override of its exam; it is judged anew in the background.

        Raises:
            ChangedMeanwhile: ``live`` is not what the name serves.
        """
        unjudged = dataclasses.replace(live.unjudged, exam_override=False, reason=reason, id=live.id)

        def change(record: AdapterRecord | None) -> AdapterRecord:
            if record is None or record.live != live:
                raise changed_meanwhile(name)
            return record.with_live(unjudged)

        said = {"decision": "accepted", "exam_override": False, "reason": reason}
        await self.remove(who, EXAM, name, change, **said)

    async def remove(self, who: Principal, action: str, name: str, change: Change, **details: Any) -> None:
        """Change a record without a new version, and say in the audit log that something was removed.

        details: without a ``version``, the line has the one that was served.
        """

        said = {"decision": "removed", **details}

        def noted(record: AdapterRecord | None) -> AdapterRecord | None:
            said.update({"version": record.live.version, **details} if record else {})
            return change(record)

        line = Line(who.key_id, action, lambda _: said)
        await in_thread(STORE, self._recorded.update, name, noted, line)
        await self._reconciler.sync()


def changed_meanwhile(name: str) -> ChangedMeanwhile:
    """What a caller is told whose change was judged for a name that is another now."""
    return ChangedMeanwhile(f"{name} was changed meanwhile; look at it and try again")


def version_of(
    judged: Judged,
    who: Principal,
    policy: dict[str, Any],
    override: bool = False,
    before: dict[str, Any] | None = None,
    reason: str = "",
    exam_override: bool = False,
) -> Version:
    """The version that a change makes.

    before: the policy that held for the name's next content, which an override leaves in force.
    exam_override: an admin has it served whatever its exam says.
    """
    report = judged.report
    return Version(
        version=0,
        digest=report.digest,
        bytes=judged.judgement.bytes,
        rank=max((module.rank for module in report.modules), default=0),
        created=time.time(),
        by=who.key_id,
        policy=policy,
        override=override,
        base_policy=before or {} if override else {},
        reason=reason,
        exam_override=exam_override,
        key=judged.judgement.accepted_key(),
        ruleset_digest=judged.ruleset,
        signed_by=report.signed_by,
    )


def taken(name: str) -> AlreadyLoaded:
    """The answer where a name has an adapter that shall stay."""
    return AlreadyLoaded(f"{name} is already loaded; replace it (?replace=true, load_inplace) or remove it")
