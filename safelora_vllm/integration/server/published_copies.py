"""Published copies, as an API server asks the gate for them, by the rules of their names."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, ParamSpec, TypeVar

from safelora_vllm.errors import ExamUnavailable, SafeLoRAError
from safelora_vllm.files import FileState
from safelora_vllm.gate.address import address, ruleset_digest
from safelora_vllm.gate.client import GateClient
from safelora_vllm.gate.protocol import GateState, Judgement
from safelora_vllm.integration.server.decisions import Failed
from safelora_vllm.integration.server.exam.no_exam import Judge, NoExam
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.tracing import past_spans, span
from safelora_vllm.policy import Policy
from safelora_vllm.report import Report
from safelora_vllm.signatures.rule import SigningRule
from safelora_vllm.store import PublishedStore, Version
from safelora_vllm.tenants.quotas import Allowance
from safelora_vllm.tenants.rules import SERVERS, Rules, TenantRules, rules_of

logger = logging.getLogger("vllm.safelora.reconcile")
P = ParamSpec("P")
R = TypeVar("R")
_GATE_CALLS = 32  # at once; the gate itself does one adapter at a time


class Copy(NamedTuple):
    """A published copy: its key, the gate's report, and the states of its files."""

    key: str
    report: Report
    state: tuple[FileState, ...]


class Judged(NamedTuple):
    """What the gate decided about a content of a name, and by which rules.

    ruleset: a digest of them. override: they are less strict than the server's, as the operator allowed.
    failed: what the exam found on the rungs on which a refused one failed.
    """

    judgement: Judgement
    ruleset: str
    override: bool
    failed: tuple[Failed, ...] = ()

    @property
    def report(self) -> Report:
        return self.judgement.report

    @property
    def exam_fields(self) -> dict[str, Any]:
        """Of the failed rungs, for the audit log and for admins; nothing where there are none."""
        return {"exam_rungs": [failed.fields for failed in self.failed]} if self.failed else {}

    def signed(self, key: str) -> Judged:
        """The same of content that was uploaded with a key's signature before; empty for none."""
        return self._replace(judgement=self.judgement.signed(key))


class Copies:
    """What is published in the store, and the gate that publishes more.

    Attributes:
        gate: its client.
        state: the gate's `state` answer.
        exam: what a copy has to pass before it is given to anybody.
    """

    def __init__(
        self,
        gate: GateClient,
        state: GateState,
        published: PublishedStore,
        tenant_rules: Callable[[str], TenantRules] = lambda _: SERVERS,
        exam: NoExam | None = None,
        opinion_of_all: bool = False,
    ) -> None:
        """tenant_rules: those of the tenant that owns a name, as they are now.

        opinion_of_all: this server gives all adapters a second opinion, whatever their policies say.
        """
        self.gate, self.state, self._published, self._tenant_rules = gate, state, published, tenant_rules
        self.exam, self._opinion_of_all = exam or NoExam(), opinion_of_all
        self._threads = ThreadPoolExecutor(_GATE_CALLS, thread_name_prefix="safelora-gate")
        self._repairing = asyncio.Lock()

    def ruleset(self, name: str) -> str:
        """A digest of the rules that hold for a name today. May read the keys file."""
        tenant = self._tenant_rules(name)
        return self.exam.ruleset(tenant.ruleset(self.state.ruleset_digest), tenant)

    @property
    def servers_ruleset(self) -> str:
        """The same for names without a tenant."""
        return self.exam.ruleset(self.state.ruleset_digest, SERVERS)

    def policy(self, name: str) -> Policy:
        """The server's policy, or that of the tenant that owns the name."""
        return self._tenant_rules(name).over(self.state.policy)

    def policy_of_uploads(self, name: str) -> Policy:
        """By which new content of a name without a policy of its own is served; a ladder may go before it."""
        rules = self._rules(name, {}, override=False, exam_override=False)
        return self.in_force(self.state.policy.with_values(rules.policy))

    @property
    def ladder(self) -> list[str]:
        """The rungs that new content of names without a tenant is tried on; none without an enforced exam."""
        terms = self.exam.terms("")
        if not terms.enforced:
            return []
        server = self.state.policy
        rungs = self.exam.rungs(server, SERVERS, Rules({}, override=False), own=False)
        return [terms.told(server.with_values(rung.policy)) for rung in rungs]

    def in_force(self, policy: Policy) -> Policy:
        """What holds on this server for what was judged by a policy."""
        return dataclasses.replace(policy, opinion=policy.opinion or self._opinion_of_all)

    def has_opinion(self, entry: Entry) -> bool:
        """Whether requests for what is served have a second opinion."""
        return entry.served is not None and self.in_force(entry.served.report.policy).opinion

    def shown(self, report: Report) -> Report:
        """A report as callers and the audit log are told of it: with the policy that is in force."""
        return dataclasses.replace(report, policy=self.in_force(report.policy))

    def signing(self, name: str) -> SigningRule | None:
        """Which signature uploads to a name have to have, as the keys file says it of its tenant."""
        return self._tenant_rules(name).signing

    async def admit(
        self,
        source: str,
        name: str,
        own: Mapping[str, Any],
        allowance: Allowance | None,
        exam_override: bool = False,
    ) -> Judged:
        """Let the gate judge a folder or archive and keep it.

        Args:
            source: the folder or archive. name: what it is to be served as.
            own: the policy of the name itself.
            allowance: what its owner may use.
            exam_override: an admin has it served whatever its exam says.

        Raises:
            QuotaExceeded: over the allowance. SafeLoRAError: the gate, or the exam, cannot.
        """

        signing = self.signing(name)

        async def judge(rules: Rules, before: Judgement | None) -> Judgement:
            if before is not None:  # each rung is of the content that was kept
                judgement = await self._ensure(before.report.digest, name, rules)
                return judgement.signed(before.report.signed_by)
            return await self._spanned(
                name, self.gate.admit, source, name, rules.policy,
                override=rules.override, allowance=allowance, signing=signing,
            )  # fmt: skip

        return await self._decide(name, own, False, judge, exam_override, upload=True)

    async def ensure(
        self, digest: str, name: str, own: Mapping[str, Any], override: bool, exam_override: bool = False
    ) -> Judged:
        """Let the gate judge stored content. override: of an admin, for ``own``. exam_override: of one too.

        Raises:
            SafeLoRAError: the gate, or the exam, cannot.
        """

        async def judge(rules: Rules, _: Judgement | None) -> Judgement:
            return await self._ensure(digest, name, rules)

        return await self._decide(name, own, override, judge, exam_override)

    async def ensure_version(self, name: str, version: Version) -> Judged:
        """`ensure` for a stored version, as its record has it."""
        own, override = version.policy, version.override
        return await self.ensure(version.digest, name, own, override, version.exam_override)

    async def _ensure(self, digest: str, name: str, rules: Rules) -> Judgement:
        return await self._spanned(
            name, self.gate.ensure, digest, name, rules.policy, override=rules.override
        )

    async def _spanned(
        self, name: str, call: Callable[P, Judgement], *arguments: P.args, **named: P.kwargs
    ) -> Judgement:
        """One judgement of the gate, as a span with its stages."""
        with span("gate", adapter=name):
            judgement = await self.ask(call, *arguments, **named)
            past_spans(judgement.stages, "gate")
        return judgement

    async def _decide(
        self,
        name: str,
        own: Mapping[str, Any],
        override: bool,
        judge: Judge,
        exam_override: bool,
        upload: bool = False,
    ) -> Judged:
        """The one place where a content is accepted: what the gate makes of it has passed the exam."""
        tenant = self._tenant_rules(name)
        rules = self._rules(name, own, override, exam_override)
        rungs = self.exam.rungs(self.state.policy, tenant, rules, bool(own) or exam_override)
        judgement, failed = await self.exam.decide(name, rungs, judge, tenant, upload, exam_override)
        ruleset = self.exam.ruleset(tenant.ruleset(judgement.ruleset_digest), tenant)
        return Judged(judgement, ruleset, rules.override, failed)

    def _rules(self, name: str, own: Mapping[str, Any], override: bool, exam_override: bool) -> Rules:
        """Those that a content is judged by, but for an exam's ladder.

        With an admin's override of the exam, the policy is the one that holds without an exam, with a second
        opinion where the ladder has one. What would be served as it was uploaded, with nothing that looks at
        harm, has one too, whatever server it was meant for; unless somebody said that it has none.
        """
        tenant = self._tenant_rules(name)
        rules = rules_of(self.state.policy, tenant, own, override)
        if exam_override:
            rules = self.exam.overridden(tenant, rules, own)
        policy, examined = self.state.policy.with_values(rules.policy), self.exam.terms(name).enforced
        said = "opinion" in own or "opinion" in tenant.policy
        if policy.enforcing and policy.selects_none and not said and (exam_override or not examined):
            rules = Rules({**policy.to_mapping(), "opinion": True}, rules.override)
        return rules

    async def ask(self, call: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """A call of ``gate`` that may take long, in threads of its own: asyncio's few are for the short ones.

        Raises:
            GateUnavailable: the gate is down or took too long. SafeLoRAError: whatever it raised.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: call(*arguments, **named))

    def find(self, name: str, version: Version) -> Copy | None:
        """The published copy of a stored version, if today's rules allow it. Reads the store.

        It may have been judged by former rules, if those differ in the policy alone and theirs is at least as
        strict as today's.
        """
        if version.refused or (report := self._published.report(version.key)) is None:
            return None
        if version.ruleset_digest != self.ruleset(name) and not self._still_allowed(name, version, report):
            return None
        if not report.policy.at_least_as_strict(self.state.policy) and not self._published.has_override(
            version.key
        ):
            return None  # an older release made it: the gate adds that when it is asked for it
        states = self.file_states(version.key)  # before the verdict: what is exchanged after it shows
        if not self.exam.passed(name, version.key, report.policy, version.exam_override):
            return None
        return Copy(version.key, report, states)

    def _still_allowed(self, name: str, version: Version, report: Report) -> bool:
        """Whether a copy by former rules is by a policy as strict as today's, all else being as it was."""
        if not self.state.frame:  # a gate that does not say so
            return False
        by_its_policy = ruleset_digest(self.state.frame, report.policy)
        if address(by_its_policy, version.digest) != version.key:
            return False
        rules = self._rules(name, version.policy, version.override, version.exam_override)
        return report.policy.at_least_as_strict(self.state.policy.with_values(rules.policy))

    async def adopt(self, entry: Entry) -> Copy:
        """The published copy of an adapter of ``--lora-modules``, by the rules of its name.

        Raises:
            SafeLoRAError: it refuses, or cannot.
        """

        async def judge(rules: Rules, _: Judgement | None) -> Judgement:
            return await self.ask(
                self.gate.admit, str(entry.folder), entry.name, rules.policy,
                override=rules.override, keep=False,
            )  # fmt: skip

        judged = await self._decide(entry.name, {}, False, judge, exam_override=False)
        return await self.copy_of(entry, judged.judgement)

    async def repair(self, entry: Entry) -> None:
        """Have the published copy of a served adapter made again where its files are damaged.

        The pool has its weights, and may have to read them again at any moment. Where the copy cannot be made
        again, they are served as long as the pool has them.
        """
        async with self._repairing:  # one at a time: uploads need the threads too
            try:
                if entry.version is None:
                    await self.adopt(entry)
                else:
                    await self.ensure_version(entry.name, entry.version)
            except SafeLoRAError as error:
                logger.error(
                    "the published copy of %r has changed and cannot be checked or made again: %s. It is "
                    "served until a worker has to read it", entry.name, error, extra=entry.log_fields,
                )  # fmt: skip

    async def copy_of(self, entry: Entry, judgement: Judgement) -> Copy:
        """The published copy of what the gate accepted for a name.

        Raises:
            AdapterRefused: it did not. ExamUnavailable: it has not passed the exam as it is now.
        """
        key = judgement.accepted_key()
        policy, override = judgement.report.policy, entry.exam_override
        states = await asyncio.to_thread(self.file_states, key)  # before the verdict, as in `find`
        if not await asyncio.to_thread(self.exam.passed, entry.name, key, policy, override):
            raise ExamUnavailable("the published copy changed after its exam: try again in a moment")
        return Copy(key, judgement.report, states)

    def file_states(self, key: str) -> tuple[FileState, ...]:
        """States of a published copy's files; none where they cannot be seen. Reads the store."""
        try:
            return self._published.state(key)
        except OSError:
            return ()
