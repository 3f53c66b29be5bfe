"""What a tenant has, what it may have, and what was refused to it of late: the body of ``GET /v1/usage``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from safelora_vllm.errors import Reason
from safelora_vllm.integration.server.registry import Entry, State, why_unavailable
from safelora_vllm.policy import Policy
from safelora_vllm.store import AdapterRecord
from safelora_vllm.tenants.quotas import LIMITS, Quota, content_sizes


class Limits(BaseModel):
    """The tenant's quota. Null is no limit."""

    max_adapters: int | None
    max_bytes: int | None
    max_rank: int | None


class Used(BaseModel):
    """What counts against the quota."""

    adapters: int
    bytes: int = Field(description="of all kept versions of all names, each content once")


class UsedVersion(BaseModel):
    """A version that is kept."""

    version: int
    digest: str
    bytes: int
    rank: int
    created: float = Field(description="seconds since 1970, UTC")


class UsedAdapter(BaseModel):
    """A name with all that is kept of it."""

    name: str
    state: State
    reasons: list[Reason] = Field(description="of a refusal by today's rules")
    problem: str = Field(description="why it is unavailable; else empty")
    second_opinion: bool = Field(description="its requests are also given to the aligned model")
    current: int
    bytes: int = Field(description="of its versions, each content once")
    versions: list[UsedVersion]


class Refused(BaseModel):
    """A call that was refused, or an adapter that today's rules refuse."""

    time: str
    action: str
    adapter: str
    reasons: list[str] = Field(description="reason codes, or quota")


class TenantUsage(BaseModel):
    """A tenant's quota, what it uses of it, the rules for its adapters, and the newest refusals."""

    tenant: str
    quota: Limits
    used: Used
    policy: dict[str, Any] = Field(
        description="by which new uploads are judged; where an exam is enforced, its ladder may go first"
    )
    adapters: list[UsedAdapter]
    refusals: list[Refused] = Field(description="the newest last, at most 20")


def usage_of(
    tenant: str,
    quota: Quota,
    policy: Policy,
    records: Mapping[str, AdapterRecord],
    registry: Mapping[str, Entry],
    refusals: Sequence[Mapping[str, Any]],
    has_opinion: Callable[[Entry], bool],
) -> dict[str, Any]:
    """The body of `TenantUsage`.

    records: of the tenant's names, from the store. has_opinion: whether what is served has a second one.
    """
    return {
        "tenant": tenant,
        "quota": {limit: getattr(quota, field) for limit, field in LIMITS.items()},
        "used": {"adapters": len(records), "bytes": sum(content_sizes(records).values())},
        "policy": policy.to_mapping(),
        "adapters": [
            _adapter(record, registry.get(name), has_opinion) for name, record in sorted(records.items())
        ],
        "refusals": [
            {name: record[name] for name in Refused.model_fields}
            for record in refusals
            if Refused.model_fields.keys() <= record.keys()
        ],
    }


def _adapter(
    record: AdapterRecord, entry: Entry | None, has_opinion: Callable[[Entry], bool]
) -> dict[str, Any]:
    known = entry or Entry(record.name, 0)  # without what this process knows of it
    return {
        "name": record.name,
        "state": known.state,
        "reasons": known.refusal.reasons if known.refusal else [],
        "problem": why_unavailable(known.problem) if known.state == "unavailable" else "",
        "second_opinion": entry is not None and has_opinion(entry),
        "current": record.current,
        "bytes": sum(content_sizes({record.name: record}).values()),
        "versions": [
            {name: getattr(version, name) for name in UsedVersion.model_fields} for version in record.versions
        ],
    }
