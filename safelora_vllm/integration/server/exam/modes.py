"""``--exam report`` and ``--exam enforce``."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from safelora_vllm.errors import Reason
from safelora_vllm.exam.ladder import name_of
from safelora_vllm.exam.sitting import REFUSED
from safelora_vllm.gate.protocol import Judgement
from safelora_vllm.integration.server.callers import acting_as, caller
from safelora_vllm.integration.server.decisions import exam_fields, log
from safelora_vllm.integration.server.exam.counts import Counted
from safelora_vllm.integration.server.exam.examiner import Examiner, NotLoaded
from safelora_vllm.integration.server.exam.limits import TooManyExams
from safelora_vllm.integration.server.exam.no_exam import Judge, NoExam
from safelora_vllm.policy import CAPS, Policy
from safelora_vllm.store.audit_log import SERVER, AuditLog
from safelora_vllm.store.serving import tenant_of
from safelora_vllm.store.verdicts import Examined
from safelora_vllm.tenants.rules import Rules, TenantRules

logger = logging.getLogger("vllm.safelora.exam")
_LATER_SECONDS = 15.0
OWN = "policy"  # the rung's name where the policy is not one of the ladder's


class _WithExaminer(NoExam):
    """What both have."""

    def __init__(self, examiner: Examiner) -> None:
        super().__init__()
        self.examiner = examiner

    def found(self, key: str) -> Examined | None:
        """From memory."""
        return self.examiner.verdicts.known(key)

    def passes(self, examined: Examined) -> bool:
        """By the threshold."""
        return self.examiner.passes(examined)

    def counted(self) -> Counted:
        """Reads their files."""
        return self.examiner.counts.all()

    async def stop(self) -> None:
        """Exams that run are left without a score."""
        await self.examiner.background.stop()


class ReportedExam(_WithExaminer):
    """Copies are examined once they are served, one after the other, and nothing is refused."""

    mode = "report"

    def __init__(self, examiner: Examiner, audit: AuditLog) -> None:
        super().__init__(examiner)
        self._audit, self._working = audit, False
        self._waiting: dict[str, str] = {}  # name → the copy that it serves now

    def is_served(self, name: str, key: str) -> None:
        """Examine a copy in the background, if it is still served by the name when its turn comes."""
        self._waiting.pop(name, None)
        if self.found(key) is None:
            self._waiting[name] = key
            if not self._working:
                self._working = True
                self.examiner.background.spawn(self._work())

    def is_gone(self, name: str) -> None:
        """Its copy is not examined any more."""
        self._waiting.pop(name, None)

    async def _work(self) -> None:
        """Examine what waits. What is over its tenant's limits stays until later."""
        try:
            while self._waiting:
                for name, key in list(self._waiting.items()):
                    if self._is_due(name, key) and await self._tried(name, key) and self._is_due(name, key):
                        del self._waiting[name]
                if self._waiting:
                    await asyncio.sleep(_LATER_SECONDS)
        finally:
            self._working = False

    def _is_due(self, name: str, key: str) -> bool:
        return self._waiting.get(name) == key

    async def _tried(self, name: str, key: str) -> bool:
        """Examine a copy, unless its tenant has had its share."""
        try:
            # Whoever's request has begun this, it is the exam of the name's owner.
            with acting_as(None), self.examiner.limits.share(tenant_of(name)) as ticket:
                await self._report(name, key, ticket)
        except TooManyExams:
            return False
        except Exception as error:  # a full disk, say: the other copies still have their turn
            about = {"adapter": name, "copy": key}  # again when it is served next
            logger.warning("adapter %r was not examined: %s", name, error, extra=about)
        return True

    async def _report(self, name: str, key: str, ticket: Callable[[], None]) -> None:
        known = await asyncio.to_thread(self.examiner.verdicts.get, key) is not None
        found = await self.examiner.examine(key, math.inf, OWN, ticket)
        if not known:
            reasons = [] if self.passes(found) else [REFUSED.code]
            await log(
                self._audit, SERVER, "exam", name,
                decision="accepted", reasons=reasons, **exam_fields(found),
            )  # fmt: skip


class EnforcedExam(_WithExaminer):
    """No copy is served that has not passed.

    ladder: policies, mildest first. chosen: the operator gave the server a policy, which is the first rung.
    named: the operator gave the ladder.
    """

    mode = "enforce"

    def __init__(
        self, examiner: Examiner, ladder: Sequence[Policy], chosen: bool, exam: str, named: bool = False
    ) -> None:
        """exam: digest of all that scores depend on besides the copy."""
        super().__init__(examiner)
        self._ladder, self._chosen, self._named = tuple(ladder), chosen, named
        self._names = {_strength(rung): name_of(rung) for rung in ladder}
        self._digest_of = [exam, examiner.threshold, [rung.id for rung in ladder], chosen, named]

    def ruleset(self, ruleset: str) -> str:
        """Another one for another exam, threshold or ladder: then all adapters are judged anew."""
        return hashlib.sha256(json.dumps([ruleset, self._digest_of]).encode()).hexdigest()

    def rungs(self, server: Policy, tenant: TenantRules, base: Rules, own: bool) -> Sequence[Rules]:
        """A policy of the name itself is the only rung.

        One of the tenant's, or of the server's that the operator chose, is the first, and rungs follow that
        are as strict. A rung of another method cannot be compared: it follows the server's policy where the
        operator gave the ladder, a tenant's never.
        """
        if own:
            return [base]
        first = server.with_values(base.policy)
        caps = {cap: getattr(first, cap) for cap in CAPS}
        ladder = [dataclasses.replace(rung, **caps) for rung in self._ladder]
        tenants = bool(set(tenant.policy) - set(CAPS))
        if self._chosen or tenants:
            named = self._named and not tenants
            return [base, *(_rules(rung, server) for rung in ladder if _follows(rung, first, named))]
        return [_rules(rung, server) for rung in ladder]

    async def decide(self, rungs: Sequence[Rules], judge: Judge, upload: bool = False) -> Judgement:
        """As `NoExam.decide`: the first rung that passes."""
        who = caller()
        with self.examiner.limits.share(who.tenant if who else None) as ticket:
            return await self._first_that_passes(rungs, judge, upload, ticket)

    async def _first_that_passes(
        self, rungs: Sequence[Rules], judge: Judge, upload: bool, ticket: Callable[[], None]
    ) -> Judgement:
        judgement: Judgement | None = None
        for rules in rungs:
            judgement = await judge(rules, judgement)
            if judgement.key is None:
                return judgement
            try:
                rung = self._names.get(_strength(judgement.report.policy), OWN)
                found = await self.examiner.examine(judgement.key, judgement.bytes, rung, ticket)
            except NotLoaded as error:
                if not upload:
                    raise
                return _refused(judgement, error.reasons)
            if self.passes(found):
                return judgement
        assert judgement is not None
        return _refused(judgement, [REFUSED])

    def passed(self, key: str) -> bool:
        """By a verdict about the very bytes."""
        found = self.examiner.verdicts.get(key)
        return found is not None and self.passes(found)

    def may_serve(self, key: str) -> bool:
        """By what is in memory."""
        found = self.found(key)
        return found is not None and self.passes(found)


def _follows(rung: Policy, first: Policy, named: bool) -> bool:
    """Whether a rung may be tried after a policy that somebody chose. named: so may one of another method."""
    if rung.at_least_as_strict(first):
        return rung != first
    return named and rung.method != first.method


def _rules(rung: Policy, server: Policy) -> Rules:
    """For the gate. The ladder is the operator's word that rungs may be less strict than its policy."""
    if rung == server:
        return Rules({}, False)
    return Rules(dataclasses.asdict(rung), not rung.at_least_as_strict(server))


def _refused(judgement: Judgement, reasons: Sequence[Reason]) -> Judgement:
    report = dataclasses.replace(judgement.report, accepted=False, reasons=list(reasons))
    return Judgement(report, None, judgement.bytes, judgement.ruleset_digest, judgement.stages)


def _strength(policy: Policy) -> tuple[Any, ...]:
    """A policy without its caps."""
    fields = dataclasses.asdict(policy)
    return tuple(value for name, value in fields.items() if name not in CAPS)
