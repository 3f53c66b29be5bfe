"""How the adapters of a name are examined, and by which policies they may be served."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safelora_vllm.exam.ladder import follows, largest_bound, name_of, parse
from safelora_vllm.policy import CAPS, Policy, chooses
from safelora_vllm.store.verdicts import Examined
from safelora_vllm.tenants.exam_rules import SERVERS_EXAM, TenantExam
from safelora_vllm.tenants.rules import Rules, TenantRules

OWN = "policy"  # the rung's name where the policy is not one of the ladder's


@dataclass(frozen=True)
class Terms:
    """Of the server, or of a tenant.

    mode: ``off``, ``report`` or ``enforce``. threshold: the largest bound that passes, nats per token.
    ladder: policies, mildest first; where it is not enforced, for tenants for whom it is.
    chosen: the operator gave the server a policy, which is the first rung. named: they gave the ladder.
    """

    mode: str
    threshold: float
    ladder: tuple[Policy, ...] = ()
    chosen: bool = False
    named: bool = False

    @property
    def enforced(self) -> bool:
        """Whether only what has passed is served."""
        return self.mode == "enforce"

    def passes(self, found: Examined, policy: Policy) -> bool:
        """Whether a score is good enough for a copy that was made by a policy."""
        return found.score.passes(self.bound(policy))

    def by_opinion(self, found: Examined, policy: Policy) -> bool:
        """Whether it passes by a second opinion only: by its score alone it would have failed."""
        return self.passes(found, policy) and not found.score.passes(self.threshold)

    def bound(self, policy: Policy) -> float:
        """The largest one that passes by a policy, nats per token."""
        return largest_bound(policy, self.ladder, self.threshold)

    def of(self, tenant: TenantExam) -> Terms:
        """What holds for a tenant on a server with these terms. The tenant's were checked before."""
        if tenant == SERVERS_EXAM:
            return self
        own = tuple(parse(tenant.ladder, Policy())) if tenant.ladder else None
        return dataclasses.replace(
            self,
            mode=tenant.mode or self.mode,
            threshold=tenant.threshold or self.threshold,
            ladder=own or self.ladder,
            named=self.named or own is not None,
        )

    @property
    def parts(self) -> list[Any]:
        """What a digest of the terms is made of."""
        return [self.mode, self.threshold, [rung.id for rung in self.ladder], self.chosen, self.named]

    def rung(self, policy: Policy) -> str:
        """The name of the rung that a policy is."""
        with_it = [dataclasses.replace(rung, opinion=True) for rung in self.ladder]  # as a policy may want it
        names = {_strength(rung): name_of(rung) for rung in (*self.ladder, *with_it)}
        return names.get(_strength(policy), OWN)

    def told(self, policy: Policy) -> str:
        """The same for people: in other words where it is not one of the ladder's."""
        name = self.rung(policy)
        return policy.summary if name == OWN else name

    def rungs(self, server: Policy, tenant: TenantRules, base: Rules, own: bool) -> Sequence[Rules]:
        """See `NoExam.rungs`. A policy of the name itself is the only rung.

        One of the tenant's, or of the server's that the operator chose, is the first, and rungs follow that
        are as strict. A rung of another method cannot be compared: it follows the server's policy where the
        operator gave the ladder, a tenant's never. Norm caps and a second opinion choose no rung: every rung
        has those of the policy.
        """
        if own or not self.enforced:
            return [base]
        first = server.with_values(base.policy)
        caps = {cap: getattr(first, cap) for cap in CAPS}
        has = (dataclasses.replace(r, **caps, opinion=r.opinion or first.opinion) for r in self.ladder)
        ladder = list(dict.fromkeys(has))
        tenants = chooses(tenant.policy)
        if self.chosen or tenants:
            named = self.named and not tenants
            return [base, *(_rules(rung, server) for rung in ladder if follows(rung, first, named))]
        return [_rules(rung, server) for rung in ladder]

    def overridden(self, base: Rules, own: Mapping[str, Any]) -> Rules:
        """See `NoExam.overridden`. An override waives the exam, not the second opinion of what fails it.

        Where a rung has one, so has the policy of the override, unless the name's own says ``opinion``.
        """
        if not self.enforced or "opinion" in own or not any(rung.opinion for rung in self.ladder):
            return base
        return Rules({**base.policy, "opinion": True}, base.override)


def _rules(rung: Policy, server: Policy) -> Rules:
    """For the gate. The ladder is the operator's word that rungs may be less strict than its policy."""
    if rung == server:
        return Rules({}, False)
    return Rules(dataclasses.asdict(rung), not rung.at_least_as_strict(server))


def _strength(policy: Policy) -> tuple[Any, ...]:
    """A policy without its caps, and without what has no effect where nothing is projected."""
    if policy.selects_none:
        return ("none", policy.opinion)
    fields = dataclasses.asdict(policy)
    return tuple(value for name, value in fields.items() if name not in CAPS)
