"""What stands between a published copy and a name that serves it. Here: nothing, as the exam is off."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from safelora_vllm.errors import ExamUnavailable, SafeLoRAError, UsageError
from safelora_vllm.gate.protocol import Judgement
from safelora_vllm.integration.server.decisions import Failed
from safelora_vllm.integration.server.exam.counts import Counted
from safelora_vllm.integration.server.exam.terms import Terms
from safelora_vllm.integration.server.registry import being_prepared
from safelora_vllm.policy import Policy
from safelora_vllm.store.verdicts import Examined
from safelora_vllm.tenants.rules import SERVERS, Rules, TenantRules

# Lets the gate judge by a rung's rules; its second argument is what it judged by the rung before.
Judge = Callable[[Rules, Judgement | None], Awaitable[Judgement]]


class Decided(NamedTuple):
    """What the gate and the exam made of a content. failed: the rungs on which a refused one failed."""

    judgement: Judgement
    failed: tuple[Failed, ...] = ()


class NoExam:
    """A server without an exam, and what one with it has to answer.

    cause: why it is off although it was asked for. Then nothing is served of tenants that have it enforced.
    """

    mode = "off"

    def __init__(
        self, cause: str = "", tenant_rules: Callable[[str], TenantRules] = lambda _: SERVERS
    ) -> None:
        """tenant_rules: those of the tenant that owns a name, as they are now."""
        self.cause, self._tenant_rules = cause, tenant_rules

    def ruleset(self, ruleset: str, tenant: TenantRules) -> str:  # noqa: ARG002
        """A digest of the rules for a tenant's adapters and of what the exam adds to them."""
        return ruleset

    def rungs(self, server: Policy, tenant: TenantRules, base: Rules, own: bool) -> Sequence[Rules]:  # noqa: ARG002
        """The rules to try for one content, mildest first.

        Args:
            server: the server's policy.
            tenant: what the keys file adds to it.
            base: what follows from both and from the policy of the name.
            own: the name has a policy of its own.
        """
        return [base]

    def overridden(self, tenant: TenantRules, base: Rules, own: Mapping[str, Any]) -> Rules:  # noqa: ARG002
        """The rules for a content that an admin has served whatever the exam says.

        Args:
            tenant: what the keys file adds to the server's policy.
            base: what follows from both and from the policy of the name.
            own: that policy.
        """
        return base

    async def decide(
        self,
        name: str,  # noqa: ARG002
        rungs: Sequence[Rules],
        judge: Judge,
        tenant: TenantRules,
        upload: bool = False,  # noqa: ARG002
        override: bool = False,
    ) -> Decided:
        """What the gate makes of a content on the first rung that may be served; or a refusal.

        Args:
            name: that it is to be served by, for the log.
            rungs: of `rungs`, to be tried in turn. judge: asks the gate.
            tenant: whose adapter it is.
            upload: what vLLM cannot load is refused. What the store has already is tried again later instead.
            override: an admin has it served whatever the exam says.

        Raises:
            TooManyExams: the tenant has had its share. SafeLoRAError: the gate or the exam cannot.
        """
        if self._is_missed(tenant) and not override:
            raise ExamUnavailable(
                "the exam that this tenant's adapters have to pass is off: ask the operator"
            )
        return Decided(await judge(rungs[0], None))

    async def examine_again(self, name: str, key: str, policy: Policy) -> Examined:  # noqa: ARG002
        """Examine a copy that a name serves. policy: the one that it was made by.

        Raises:
            UsageError: there is no exam. Unavailable: it gave no score.
        """
        raise UsageError(
            f"there is no exam: {self.cause or 'start the server with --exam report or --exam enforce'}"
        )

    def passed(self, name: str, key: str, policy: Policy, override: bool) -> bool:
        """Whether a name may serve a published copy as it is in the store now. Reads the store.

        policy: the one that it was made by. override: an admin has its content served whatever the exam says.
        """
        return self.may_serve(name, key, policy, override)

    def may_serve(self, name: str, key: str, policy: Policy, override: bool) -> bool:  # noqa: ARG002
        """The same of a copy that `passed` or `decide` has looked at. Reads no verdict."""
        return override or not self._is_missed(self._tenant_rules(name))

    def _is_missed(self, tenant: TenantRules) -> bool:
        return bool(self.cause) and tenant.exam.mode == "enforce"

    def has_failed(self, name: str, key: str, policy: Policy, override: bool) -> bool:  # noqa: ARG002
        """Whether a copy that is served has failed its re-examination. Reads no verdict."""
        return False

    async def note_failures(self, names: Sequence[str]) -> None:
        """What these names served has failed: ask their tenants' adapters both halves for a while."""

    async def share_failures(self, keys: Sequence[str]) -> None:
        """Have what re-examinations found of other copies count for these, where the files are the same."""

    async def renew(self) -> str:
        """See whether there are other probes to ask. The digest of those that are asked now."""
        return ""

    def is_served(self, name: str, key: str, policy: Policy) -> None:
        """Note that a name serves a copy. policy: the one that it was made by."""

    def pending(self, name: str) -> SafeLoRAError:
        """The answer while a name waits for what it is to serve."""
        return being_prepared(name)

    def is_gone(self, name: str) -> None:
        """Note that a name is no more."""

    def found(self, key: str) -> Examined | None:  # noqa: ARG002
        """What the exam found of a copy that is served, before it was."""
        return None

    async def is_marked(self, name: str) -> bool:  # noqa: ARG002
        """Never."""
        return False

    def found_again(self, key: str) -> Examined | None:  # noqa: ARG002
        """What the newest re-examination found of it."""
        return None

    def look(self, keys: Sequence[str]) -> bool:  # noqa: ARG002
        """Whether any server has examined one of these copies again since the last look. Reads the store."""
        return False

    def terms(self, name: str) -> Terms:  # noqa: ARG002
        """What holds for the adapters of a name."""
        return Terms("off", math.inf)

    @property
    def scored(self) -> float:
        """When an exam last gave a score, seconds of the monotonic clock."""
        return -math.inf

    def counted(self) -> Counted:
        """The exams of all API servers of this host."""
        return Counted()

    async def stop(self) -> None:
        """End what is done in the background."""
