"""``--exam report`` and ``--exam enforce``: what has to be known of a copy before it is served."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from safelora_vllm.errors import ExamUnavailable, Reason, SafeLoRAError
from safelora_vllm.exam.sitting import REFUSED, refusal
from safelora_vllm.gate.protocol import Judgement
from safelora_vllm.integration.server.callers import caller
from safelora_vllm.integration.server.decisions import Failed, exam_fields, log
from safelora_vllm.integration.server.exam.counts import Counted
from safelora_vllm.integration.server.exam.examiner import Asked, Examiner, NotLoaded
from safelora_vllm.integration.server.exam.limits import Limit
from safelora_vllm.integration.server.exam.no_exam import Decided, Judge, NoExam
from safelora_vllm.integration.server.exam.renewal import Renewal
from safelora_vllm.integration.server.exam.reports import Reports
from safelora_vllm.integration.server.exam.terms import OWN, Terms
from safelora_vllm.integration.server.registry import AwaitsExam
from safelora_vllm.policy import Policy
from safelora_vllm.store.audit_log import EXAM, SERVER, AuditLog
from safelora_vllm.store.name_record import tenant_of
from safelora_vllm.store.verdicts import Examined, Verdicts
from safelora_vllm.tenants.rules import SERVERS, Rules, TenantRules


class Exam(NoExam):
    """An exam that is held.

    What is reported is examined once it is served. Of what is enforced, no copy is served that has not passed
    the first half of the probes, or that has failed the held-out half.
    """

    def __init__(
        self,
        examiner: Examiner,
        audit: AuditLog,
        terms: Terms,
        tenant_rules: Callable[[str], TenantRules] = lambda _: SERVERS,
        renewal: Renewal | None = None,
    ) -> None:
        """terms: the server's. tenant_rules: those of the tenant that owns a name, as they are now.

        renewal: of the operator's own probes.
        """
        super().__init__()
        self._renewal, self._pending = renewal, set[str]()
        self.examiner, self.mode = examiner, terms.mode
        self._audit, self._server, self._tenant_rules = audit, terms, tenant_rules
        self._reports = Reports(
            examiner.background, examiner.limits, lambda name: _limit(tenant_rules(name)), self._report
        )

    def terms(self, name: str) -> Terms:
        """What holds for the adapters of a name."""
        return self._of(self._tenant_rules(name))

    def _of(self, tenant: TenantRules) -> Terms:
        return self._server.of(tenant.exam)

    def ruleset(self, ruleset: str, tenant: TenantRules) -> str:
        """Where it is enforced, another one for another exam, threshold or ladder."""
        terms = self._of(tenant)
        if not terms.enforced:
            return ruleset
        parts = [ruleset, self.examiner.sheets.first.digest, *terms.parts]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def rungs(self, server: Policy, tenant: TenantRules, base: Rules, own: bool) -> Sequence[Rules]:
        """By the terms of the tenant."""
        return self._of(tenant).rungs(server, tenant, base, own)

    def overridden(self, tenant: TenantRules, base: Rules, own: Mapping[str, Any]) -> Rules:
        """By the terms of the tenant."""
        return self._of(tenant).overridden(base, own)

    async def decide(
        self,
        name: str,
        rungs: Sequence[Rules],
        judge: Judge,
        tenant: TenantRules,
        upload: bool = False,
        override: bool = False,
    ) -> Decided:
        """As `NoExam.decide`: the first rung that passes."""
        try:
            return await self._decide(name, rungs, judge, tenant, upload, override)
        finally:
            self._pending.discard(name)

    async def _decide(
        self,
        name: str,
        rungs: Sequence[Rules],
        judge: Judge,
        tenant: TenantRules,
        upload: bool,
        override: bool,
    ) -> Decided:
        terms, who = self._of(tenant), caller()
        if override or not terms.enforced:
            return Decided(await judge(rungs[0], None))
        share = self.examiner.limits.share(who.tenant if who else None, _limit(tenant))
        with share as ticket, self._same_probes():
            return await self._first_that_passes(name, rungs, judge, terms, upload, ticket)

    @contextmanager
    def _same_probes(self) -> Iterator[None]:
        """Else a verdict by former probes would count as one by these, or a failure by them for nothing."""
        sheets = self.examiner.sheets
        yield
        if self.examiner.sheets is not sheets:
            raise ExamUnavailable("the probes were changed during the exam: try again")

    async def _first_that_passes(
        self,
        name: str,
        rungs: Sequence[Rules],
        judge: Judge,
        terms: Terms,
        upload: bool,
        ticket: Callable[[], None],
    ) -> Decided:
        """Where a rung fails the held-out half, the ones above it have to pass that too.

        So has each rung where something of the tenant has failed that half lately.
        """
        judgement: Judgement | None = None
        failed: list[Failed] = []
        for rules in rungs:
            judgement = await judge(rules, judgement)
            if judgement.key is None:
                return Decided(judgement)
            try:
                asked = self._asked(name, judgement.key, terms, policy := judgement.report.policy)
                found = await self.examiner.examine(asked, judgement.bytes, ticket)
                if not terms.passes(found, policy):
                    failed.append(Failed(asked.rung, found, terms.threshold, again=False))
                    continue
                again = await asyncio.to_thread(self._held_out.of_same_files, asked.key)
                if again is None and (any(rung.again for rung in failed) or await self.is_marked(name)):
                    ticket()
                    again = await self.examiner.examine_again(asked, judgement.bytes)
            except NotLoaded as error:
                if not upload:
                    raise
                return Decided(_refused(judgement, error.reasons))
            if again is None or terms.passes(again, policy):
                return Decided(judgement)
            failed.append(Failed(asked.rung, again, terms.threshold, again=True))
            await self.note_failures([name])
        assert judgement is not None
        return Decided(_refused(judgement, [refusal(len(rungs))]), tuple(failed))

    async def examine_again(self, name: str, key: str, policy: Policy) -> Examined:
        """What the held-out half of the probes finds of a copy that a name serves. policy: its report's.

        Raises:
            UsageError: the aligned model does not refuse that half. Unavailable: there is no score.
        """
        with self._same_probes():
            return await self.examiner.examine_again(self._asked(name, key, self.terms(name), policy))

    def passed(self, name: str, key: str, policy: Policy, override: bool) -> bool:
        """By verdicts about the very bytes."""
        first, held_out = self._first.get(key), self._held_out.get(key)
        return override or _is_enough(self.terms(name), policy, first, held_out)

    def may_serve(self, name: str, key: str, policy: Policy, override: bool) -> bool:
        """By what is in memory."""
        return override or _is_enough(self.terms(name), policy, self.found(key), self.found_again(key))

    def has_failed(self, name: str, key: str, policy: Policy, override: bool) -> bool:
        """By what is in memory."""
        terms, again = self.terms(name), self.found_again(key)
        return not override and terms.enforced and again is not None and not terms.passes(again, policy)

    async def note_failures(self, names: Sequence[str]) -> None:
        """In the store."""
        for tenant in sorted({tenant_of(name) for name in names} - {""}):
            await asyncio.to_thread(self.examiner.failed.note, tenant)

    async def is_marked(self, name: str) -> bool:
        """Whether something of the tenant has failed the held-out half lately. It may fail during an exam."""
        return await asyncio.to_thread(self.examiner.failed.has, tenant_of(name))

    async def share_failures(self, keys: Sequence[str]) -> None:
        """By the verdicts' files. Reads the store."""
        await asyncio.to_thread(self._held_out.share, keys)

    async def renew(self) -> str:
        """Looks at the file of probes."""
        if self._renewal is not None:
            await self._renewal.look(self.examiner)
            self.cause = self._renewal.problem
        return self.examiner.sheets.first.digest

    def is_served(self, name: str, key: str, policy: Policy) -> None:
        """Where that is not known yet, find out in the background what it is like."""
        self.is_gone(name)  # from what waits
        found = self.found(key)
        if self.terms(name).mode != "off" and not (found and found.score.is_whole):
            self._reports.add(name, key, policy)

    def pending(self, name: str) -> SafeLoRAError:
        """Says how long the exams of those before it may take."""
        if not self.terms(name).enforced:
            return super().pending(name)
        self._pending.add(name)
        return AwaitsExam.within(name, len(self._pending) * self.examiner.counts.usual_seconds)

    def is_gone(self, name: str) -> None:
        """Its copy is not examined any more."""
        self._pending.discard(name)
        self._reports.drop(name)

    async def _report(self, name: str, key: str, policy: Policy, ticket: Callable[[], None]) -> None:
        terms = self.terms(name)
        known = await asyncio.to_thread(self._first.get, key)
        asked = self._asked(name, key, terms, policy)._replace(rung=OWN, whole=True)
        found = await self.examiner.examine(asked, math.inf, ticket)
        if not (known and known.score.is_whole):
            reasons = [] if terms.passes(found, policy) else [REFUSED.code]
            await log(
                self._audit, SERVER, EXAM, name,
                decision="accepted", reasons=reasons, **exam_fields(found),
            )  # fmt: skip

    def found(self, key: str) -> Examined | None:
        """From memory."""
        return self._first.known(key)

    def found_again(self, key: str) -> Examined | None:
        """From memory."""
        return self._held_out.known(key)

    def look(self, keys: Sequence[str]) -> bool:
        """By the verdicts' files. Reads the store."""
        for sheet in (self.examiner.sheets.first, self.examiner.sheets.held_out):
            sheet.mark_used()
        return self._held_out.read_changed(keys)

    @property
    def scored(self) -> float:
        """Of this API server process."""
        return self.examiner.scored

    def counted(self) -> Counted:
        """Reads their files."""
        return self.examiner.counts.all()

    async def stop(self) -> None:
        """Exams that run are left without a score."""
        await self.examiner.background.stop()

    def _asked(self, name: str, key: str, terms: Terms, policy: Policy) -> Asked:
        # A rung with an opinion may publish the same bytes as one without, and passes whatever it scores.
        whole = any(rung.opinion for rung in terms.ladder)
        return Asked(name, key, terms.rung(policy), terms.threshold, terms.bound(policy), whole)

    @property
    def _first(self) -> Verdicts:
        return self.examiner.sheets.first.verdicts

    @property
    def _held_out(self) -> Verdicts:
        return self.examiner.sheets.held_out.verdicts


def _is_enough(terms: Terms, policy: Policy, first: Examined | None, held_out: Examined | None) -> bool:
    if not terms.enforced:
        return True
    found = [first] if held_out is None else [first, held_out]
    return all(one is not None and terms.passes(one, policy) for one in found)


def _limit(tenant: TenantRules) -> Limit:
    return Limit(tenant.exam.per_minute, tenant.exam.per_day)


def _refused(judgement: Judgement, reasons: Sequence[Reason]) -> Judgement:
    report = dataclasses.replace(judgement.report, accepted=False, reasons=list(reasons))
    return Judgement(report, None, judgement.bytes, judgement.ruleset_digest, judgement.stages)
