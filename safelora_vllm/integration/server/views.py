"""What callers are shown of adapters and of their tenant's use of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from safelora_vllm.errors import Forbidden, UsageError
from safelora_vllm.integration.server.exam.terms import OWN
from safelora_vllm.integration.server.reconcile import Reconciler
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.schemas import exam_figures, report_of, summary_of
from safelora_vllm.integration.server.traffic import Traffic
from safelora_vllm.integration.server.usage import usage_of
from safelora_vllm.integration.server.visibility import check_visible, look_up, unknown
from safelora_vllm.settings import ServerSettings
from safelora_vllm.store import AdapterRecord
from safelora_vllm.tenants.keys_file import Tenant
from safelora_vllm.tenants.principal import Principal
from safelora_vllm.tenants.quotas import own_records


@dataclass(frozen=True)
class Views:
    """Answers that change nothing.

    tenants: of the keys file, as it is now. tenant_reports: whether others than admins see the figures of
    each module. traffic: of an adapter, as it is now. searching: held by the one search of the audit log.
    """

    reconciler: Reconciler
    tenants: Callable[[], Mapping[str, Tenant]] = dict
    tenant_reports: str = ServerSettings.tenant_reports
    traffic: Callable[[str], Traffic | None] = lambda _: None
    searching: asyncio.Lock = field(default_factory=asyncio.Lock)

    def find(self, who: Principal, name: str) -> Entry:
        """A served adapter that the caller may see.

        Raises:
            UnknownAdapter. Unavailable or AdapterRefused: it cannot be served at the moment.
        """
        entry = look_up(self.reconciler.registry, who, name)
        entry.current()
        return entry

    def summary(self, entry: Entry) -> dict[str, Any]:
        """The body of `AdapterSummary`, of an adapter that is served."""
        return summary_of(entry, self.reconciler.copies.shown(entry.current().report))

    def report(self, who: Principal, entry: Entry) -> dict[str, Any]:
        """The body of `AdapterReport` for a caller, of an adapter that is served."""
        name, shown = entry.name, self.reconciler.copies.shown(entry.current().report)
        shows = self.shows_figures(who)
        found = report_of(entry, shown, shows)
        figures = entry.current().figures if shows else None
        traffic = _traffic_info(self.traffic(name)) if who.may_manage(name) else None
        return {**found, "figures": figures, "traffic": traffic, "exam": self._exam_info(who, entry)}

    def shows_figures(self, who: Principal) -> bool:
        """Whether a caller is shown the figures of modules."""
        return who.kind == "admin" or self.tenant_reports == "full"

    def exam(self, who: Principal) -> dict[str, str]:
        """The body of `ExamState`."""
        exam = self.reconciler.copies.exam
        return {"mode": exam.mode, "cause": exam.cause if who.kind == "admin" else ""}

    def _exam_info(self, who: Principal, entry: Entry) -> dict[str, Any] | None:
        """The body of `ExamInfo`. Scores would help whoever tries out the exam."""
        exam = self.reconciler.copies.exam
        served, terms = entry.current(), exam.terms(entry.name)
        key, policy = served.key, served.report.policy
        first, again = (
            {
                **exam_figures(found, who.kind == "admin"),
                "passed": terms.passes(found, policy),
                "by_opinion": terms.by_opinion(found, policy) if who.kind == "admin" else None,
            }
            if found
            else None
            for found in (exam.found(key), exam.found_again(key))
        )
        return {**first, "again": again} if first else None

    def verdict(self, who: Principal, entry: Entry) -> dict[str, Any] | None:
        """The body of `Verdict`; None where nothing is served, or it was not examined."""
        if entry.served is None or (info := self._exam_info(who, entry)) is None:
            return None
        found = [info, info["again"]] if info["again"] else [info]
        terms = self.reconciler.copies.exam.terms(entry.name)
        rung = terms.rung(entry.served.report.policy)
        passed = all(one["passed"] for one in found)
        by_opinion = passed and any(one["by_opinion"] for one in found)
        return {
            "passed": passed,
            "by_opinion": by_opinion if who.kind == "admin" else None,
            "rung": None if rung == OWN else rung,
            "bound": max(one["bound"] for one in found) if who.kind == "admin" else None,
            "enforced": terms.enforced and not entry.exam_override,
        }

    async def versions(self, who: Principal, name: str) -> AdapterRecord:
        """All versions that the store keeps of a name that the caller may see."""
        check_visible(who, name)
        record = await asyncio.to_thread(self.reconciler.names.get, name)
        if record is None:
            raise unknown(name)
        return record

    async def usage(self, who: Principal, tenant: str | None) -> dict[str, Any]:
        """The body of `TenantUsage`. tenant: whose an admin wants to see.

        Raises:
            UsageError: an admin names none, or one that does not exist. Forbidden: a tenant names another.
        """
        if who.kind == "tenant" and tenant not in (None, who.tenant):
            raise Forbidden("this key sees the usage of its own tenant only: leave tenant out")
        owner, known = who.tenant or tenant, self.tenants()
        if owner is None:
            raise UsageError("whose usage is not said: expected ?tenant=NAME with an admin's key")
        records = await asyncio.to_thread(own_records, self.reconciler.names, owner)
        if owner not in known and not records and who.kind == "admin":
            raise UsageError(
                f"{owner!r:.200} is not a tenant: the keys file has {', '.join(known) or 'none'}"
            )
        quota = known[owner].quota if owner in known else who.quota
        copies, registry = self.reconciler.copies, self.reconciler.registry
        policy = await asyncio.to_thread(copies.policy_of_uploads, f"{owner}/")
        refusals = await asyncio.to_thread(self.reconciler.audit.refusals, owner)
        return usage_of(owner, quota, policy, records, registry, refusals, copies.has_opinion)


def _traffic_info(traffic: Traffic | None) -> dict[str, int] | None:
    if traffic is None:
        return None
    return {
        "requests": traffic.hour_requests, "generated_tokens": traffic.hour_tokens,
        "running": traffic.running, "waiting": traffic.waiting,
        "second_opinion_refusals": traffic.opinion_refused,
    }  # fmt: skip
