"""Examining again what is served, with the half of the probes that no first exam asks.

What fails is withdrawn on all servers of the store, and judged anew: a stricter rung that passes both halves
brings it back, or it is refused. What else its tenant has here is judged anew too, and has to pass both.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import NamedTuple

from safelora_vllm.errors import SafeLoRAError
from safelora_vllm.exam.sitting import REFUSED
from safelora_vllm.integration.server.decisions import exam_fields, log
from safelora_vllm.integration.server.exam.no_exam import NoExam
from safelora_vllm.integration.server.registry import Entry, Registry
from safelora_vllm.store.audit_log import EXAM, SERVER, AuditLog
from safelora_vllm.store.name_record import tenant_of
from safelora_vllm.store.verdicts import Examined

logger = logging.getLogger("vllm.safelora.exam")


class Outcome(NamedTuple):
    """Of a re-examination.

    by_opinion: it passed by its second opinion only. withdrawn: it is not served any more.
    """

    found: Examined
    passed: bool
    by_opinion: bool
    withdrawn: bool


class Again:
    """Re-examinations of one API server process."""

    def __init__(
        self,
        exam: NoExam,
        registry: Registry,
        withdraw: Callable[[Entry, str, SafeLoRAError], None],
        judge_anew: Callable[[str], None],
        audit: AuditLog,
    ) -> None:
        """withdraw: an entry, with why and what callers are told. judge_anew: a name, in the background."""
        self.exam, self.registry = exam, registry
        self._withdraw, self._judge_anew, self._audit = withdraw, judge_anew, audit
        self._asked = ""  # digest of the probes

    async def examine(self, entry: Entry, actor: str = SERVER) -> Outcome:
        """Examine what a name serves. actor: who wants it, for the audit log.

        Raises:
            UsageError: there is no exam, or the aligned model does not refuse the held-out half.
            SafeLoRAError: it is not served, or there is no score; it stays as it is.
        """
        served = entry.current()
        key, terms = served.key, self.exam.terms(entry.name)
        found = await self.exam.examine_again(entry.name, key, served.report.policy)
        passed, gone = terms.passes(found, served.report.policy), self._has_failed(entry)
        failed = await self._withdraw_failed()
        if gone and all(other.name != entry.name for other in failed):  # it was replaced or removed meanwhile
            await self._note_failures([entry.name])
            failed.append(entry)
        if actor != SERVER or not passed:
            await self._log(entry, actor, found, passed, gone)
        # Other rules may have made the same files, and what passes by one tenant's may fail by another's.
        await self.exam.share_failures(sorted(self._keys()))
        failed += await self._withdraw_failed()
        for other in failed:
            if other.name != entry.name:
                await self._log(other, SERVER, self.exam.found_again(_key(other)) or found, False, True)
        self._judge_others_of({tenant_of(each.name) for each in failed} - {""})
        return Outcome(found, passed, terms.by_opinion(found, served.report.policy), gone)

    async def look(self) -> None:
        """Withdraw what another server of the store has found to fail. For each heartbeat."""
        if self.exam.mode == "off":
            return
        if await asyncio.to_thread(self.exam.look, sorted(self._keys())):
            await self._withdraw_failed()
        before, self._asked = self._asked, await self.exam.renew()
        if before and before != self._asked:
            self._report_anew()

    def _report_anew(self) -> None:
        """After a change of the probes: what is served whatever comes out. All else has other rules now."""
        for name, entry in self.registry.items():
            if entry.served and (entry.exam_override or not self.exam.terms(name).enforced):
                self.exam.is_served(name, _key(entry), entry.served.report.policy)

    async def _withdraw_failed(self) -> list[Entry]:
        """Stop serving what may not be served any more, and have it judged anew. What that was."""
        failed = [entry for entry in self.registry.values() if self._has_failed(entry)]
        for entry in failed:
            self._withdraw(entry, "it failed its re-examination", self.exam.pending(entry.name))
        await self._note_failures([entry.name for entry in failed])
        for entry in failed:
            self._judge_anew(entry.name)
        return failed

    async def _note_failures(self, names: list[str]) -> None:
        try:
            await self.exam.note_failures(names)
        except SafeLoRAError as error:  # so does the judgement that follows, until the store can be written
            logger.error("an adapter failed its re-examination, and its tenant is not marked: %s", error)

    def _judge_others_of(self, tenants: set[str]) -> None:
        """What these tenants have here besides may be the same with one changed weight."""
        for name, entry in self.registry.items():
            if tenant_of(name) in tenants and entry.served and not self.exam.found_again(_key(entry)):
                self._judge_anew(name)

    async def judge_if_marked(self, name: str) -> None:
        """What was examined before its tenant was marked, and served after that."""
        if await self.exam.is_marked(name):
            entry = self.registry.get(name)
            if entry and entry.served and not entry.exam_override and not self.exam.found_again(_key(entry)):
                self._judge_anew(name)

    def _keys(self) -> set[str]:
        """Of all copies that are served."""
        return {key for entry in self.registry.values() if (key := _key(entry))}

    def _has_failed(self, entry: Entry) -> bool:
        """Whether what an entry serves has failed its re-examination."""
        if entry.served is None:
            return False
        policy = entry.served.report.policy
        return self.exam.has_failed(entry.name, _key(entry), policy, entry.exam_override)

    async def _log(self, entry: Entry, actor: str, found: Examined, passed: bool, gone: bool) -> None:
        await log(
            self._audit, actor, EXAM, entry.name,
            decision="refused" if gone else "accepted", reasons=[] if passed else [REFUSED.code], again=True,
            version=entry.version.version if entry.version else None, **exam_fields(found),
        )  # fmt: skip


def _key(entry: Entry) -> str:
    """Of the copy that is served; none where nothing is."""
    return entry.served.key if entry.served else ""
