"""What a caller may see of all adapters, served or not, and of the audit log: for the page and `top`."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import BaseModel, Field

from safelora_vllm.errors import Reason
from safelora_vllm.integration.server.registry import Entry, State, why_unavailable
from safelora_vllm.integration.server.schemas import Figures
from safelora_vllm.integration.server.views import Views
from safelora_vllm.integration.server.visibility import visible
from safelora_vllm.policy import Policy
from safelora_vllm.store.audit_log import DECISIONS
from safelora_vllm.tenants.principal import Kind, Principal

MOST_RECORDS = 200


class CallerInfo(BaseModel):
    """Who asks."""

    kind: Kind
    key: str = Field(description="id of the key; not secret")
    tenant: str | None


class Verdict(BaseModel):
    """What the exams of the copy that is served found."""

    passed: bool = Field(description="all of them")
    by_opinion: bool | None = Field(
        description="one passed only since the adapter has a second opinion; for admins only"
    )
    rung: str | None = Field(description="of the ladder, by which it is served; null for another policy")
    bound: float | None = Field(description="the largest, in nats per token; for admins only")
    enforced: bool = Field(description="what does not pass is not served")


class OverviewItem(BaseModel):
    """One adapter, served or not."""

    name: str
    state: State
    problem: str = Field(description="why it is not served; empty where it is")
    reasons: list[Reason] = Field(description="of a refusal by today's rules")
    changeable: bool = Field(description="the caller may replace, roll back and remove it")
    version: int | None = Field(description="null for an adapter of --lora-modules")
    created: float | None = Field(description="of the version: seconds since 1970, UTC")
    by: str | None = Field(description="id of the key that made the version")
    bytes: int | None
    rank: int | None
    method: str | None = Field(
        description="of the policy by which it was judged, none where that projects nothing; null while it "
        "is not served"
    )
    mode: str | None
    override: bool
    second_opinion: bool = Field(description="its requests are also given to the aligned model")
    exam: Verdict | None = Field(description="null where what is served was not examined")
    figures: Figures | None = Field(
        description="null while it is not served, and with --tenant-reports summary for all but admins"
    )


class Overview(BaseModel):
    """All adapters that the caller may use, and what the caller may do."""

    caller: CallerInfo
    may_upload: bool
    max_adapter_bytes: int = Field(description="largest file of an upload")
    policy: dict[str, Any] | None = Field(
        description="by which new uploads are judged: the tenant's, else the server's. Null for other callers"
    )
    adapters: list[OverviewItem] = Field(description="sorted by name")


class AuditRecord(BaseModel):
    """One decision."""

    time: str
    actor: str = Field(description="id of the key, or server or operator")
    action: str
    adapter: str
    decision: str = Field(description=f"one of {', '.join(DECISIONS)}")
    reasons: list[str] = Field(description="reason codes of a refusal, or quota")
    version: int | None
    override: bool
    exam_override: bool
    reason: str = Field(description="why, as the admin said")


class AuditTrail(BaseModel):
    """Records of the audit log, the newest first."""

    records: list[AuditRecord]
    complete: bool = Field(description="false where older records may exist: only the log's end is searched")


async def overview_of(views: Views, who: Principal, max_adapter_bytes: int) -> dict[str, Any]:
    """The body of `Overview`."""
    figures = views.shows_figures(who)
    policy: Policy | None = None
    if who.kind in ("admin", "tenant"):
        owner = f"{who.tenant}/" if who.tenant else ""
        policy = await asyncio.to_thread(views.reconciler.copies.policy_of_uploads, owner)
    entries = sorted(visible(views.reconciler.registry, who).items())
    return {
        "caller": {"kind": who.kind, "key": who.key_id, "tenant": who.tenant},
        "may_upload": policy is not None,
        "max_adapter_bytes": max_adapter_bytes,
        "policy": policy.to_mapping() if policy else None,
        "adapters": [
            {
                **_item(entry, who, figures),
                "second_opinion": views.reconciler.copies.has_opinion(entry),
                "exam": views.verdict(who, entry),
            }
            for _, entry in entries
        ],
    }


def _item(entry: Entry, who: Principal, figures: bool) -> dict[str, Any]:
    version, served, refusal = entry.version, entry.served, entry.refusal
    policy = served.report.policy if served else None
    return {
        "name": entry.name,
        "state": entry.state,
        "problem": "" if served else _problem(entry, who),
        "reasons": refusal.reasons if refusal else [],
        "changeable": entry.folder is None and who.may_manage(entry.name),
        "version": version.version if version else None,
        "created": version.created if version else None,
        "by": version.by if version else None,
        "bytes": version.bytes if version else None,
        "rank": version.rank if version else None,
        "method": policy.applied if policy else None,
        "mode": policy.mode if policy else None,
        "override": version.override if version else False,
        "figures": served.figures if served and figures else None,
    }


def _problem(entry: Entry, who: Principal) -> str:
    """Why it is not served. What is out of order on the server is told to admins only."""
    if entry.refusal:
        return "today's rules refuse it"
    if entry.problem is not None and who.kind == "admin":
        return str(entry.problem)
    return why_unavailable(entry.problem)


async def audit_of(
    views: Views, who: Principal, adapter: str | None, decision: str | None, limit: int
) -> dict[str, Any]:
    """The body of `AuditTrail`: of the names that the caller may change, also of those that are gone."""
    wanted = {"adapter": adapter, "decision": decision}

    def matches(record: dict[str, Any]) -> bool:
        return who.may_manage(str(record.get("adapter"))) and all(
            value is None or record.get(name) == value for name, value in wanted.items()
        )

    begins = adapter if adapter is not None else f"{who.tenant}/" if who.tenant else None
    async with views.searching:
        found, complete = await asyncio.to_thread(
            views.reconciler.audit.newest, matches, limit, adapter=begins, decision=decision
        )
    return {"records": [_record(record) for record in found], "complete": complete}


def _record(record: dict[str, Any]) -> dict[str, Any]:
    plain = {name: str(record.get(name, "")) for name in ("time", "actor", "action", "adapter", "decision")}
    return {
        **plain,
        "reasons": [str(code) for code in record.get("reasons", [])],
        "version": record.get("version"),
        "override": bool(record.get("override")),
        "exam_override": bool(record.get("exam_override")),
        "reason": str(record.get("reason", "")),
    }
