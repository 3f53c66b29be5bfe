"""By which rules an adapter is judged: the server's policy, its tenant's of the keys file, and its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from safelora_vllm.errors import KeysError, SafeLoRAError
from safelora_vllm.policy import CAPS, Policy
from safelora_vllm.signatures.rule import SigningRule
from safelora_vllm.tenants.exam_rules import SERVERS_EXAM, TenantExam


@dataclass(frozen=True)
class TenantRules:
    """What the keys file says of the rules for one tenant's adapters.

    Attributes:
        policy: fields that replace those of the server's policy.
        less_strict: the operator allows that this, or the exam, is less strict than the server's.
        signing: which signature uploads have to have; None where nobody looks for one.
        exam: how its adapters are examined.
    """

    policy: Mapping[str, Any] = field(default_factory=dict)
    less_strict: bool = False
    signing: SigningRule | None = None
    exam: TenantExam = SERVERS_EXAM

    def over(self, server: Policy) -> Policy:
        """The tenant's whole policy on a server with this one.

        Raises:
            PolicyError: a field is unknown or out of range.
        """
        return server.with_values(self.policy) if self.policy else server

    def check(self, entry: str, server: Policy, fits: Callable[[Policy], None]) -> None:
        """Whether a server with this policy can judge by these rules.

        Args:
            entry: of the keys file, for messages.
            server: its policy.
            fits: raises a SafeLoRAError where the projector cache lacks what a policy reads.

        Raises:
            KeysError: a field is unknown, out of range or without effect, or the rules are less strict than
                the server's and the entry does not say so.
        """
        try:
            policy = self.over(server)
            policy.check_effective(name for name in self.policy if self.policy[name] != getattr(server, name))
            fits(policy)
        except SafeLoRAError as error:
            raise KeysError(f"{entry}.policy: {error}") from error
        if not (self.less_strict or policy.at_least_as_strict(server)):
            raise KeysError(
                f"{entry}.policy ({_beside(policy, server)}) is less strict than the server's policy "
                f"({_beside(server, policy)}), or cannot be compared with it. Make it stricter, or set "
                f"less_strict = true in [{entry}]"
            )

    def ruleset(self, server_ruleset: str) -> str:
        """A digest of all rules that hold for the tenant's adapters, but for those of an exam.

        Args:
            server_ruleset: the digest of the server's own, which it is for a tenant without a policy.
        """
        if not self.policy:
            return server_ruleset
        parts = [server_ruleset, dict(self.policy), self.less_strict]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _beside(policy: Policy, other: Policy) -> str:
    """A policy in words, with the caps in which another one differs."""
    caps = (f"{cap} {getattr(policy, cap):g}" for cap in CAPS if getattr(policy, cap) != getattr(other, cap))
    return ", ".join([policy.summary, policy.mode, *caps])


SERVERS = TenantRules()


@dataclass(frozen=True)
class Rules:
    """What the gate is asked to judge a content by. See `Admit` in `safelora_vllm.gate.protocol`.

    Attributes:
        policy: fields that replace those of the server's policy.
        override: the operator's word that it may be less strict than that.
    """

    policy: dict[str, Any]
    override: bool


def rules_of(server: Policy, tenant: TenantRules, own: Mapping[str, Any], override: bool) -> Rules:
    """The rules for one content.

    Args:
        server: the server's policy.
        tenant: the rules of the tenant whose name it has.
        own: the policy that an admin set for the name; none for the tenant's or the server's.
        override: an admin allowed that ``own`` is less strict. Otherwise that of it holds which is stricter.

    Raises:
        PolicyError: a field is unknown or out of range.
    """
    base = tenant.over(server)
    asked = base.with_values(own) if own else base
    if not (override or asked.at_least_as_strict(base)):
        asked = base.tightened(asked)
    if asked == server:
        return Rules({}, False)
    looser = not asked.at_least_as_strict(server)
    return Rules(dataclasses.asdict(asked), looser and (override or tenant.less_strict))
