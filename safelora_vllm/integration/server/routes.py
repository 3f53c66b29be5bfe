"""Our HTTP routes. Bodies are vLLM's where vLLM has the route, errors have OpenAI's form."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from vllm.v1.metrics.prometheus import get_prometheus_registry

from safelora_vllm.integration.server import loading_routes
from safelora_vllm.integration.server.exam.hidden_name import without_hidden
from safelora_vllm.integration.server.http_errors import documented, without_lora
from safelora_vllm.integration.server.metrics import Metrics
from safelora_vllm.integration.server.overview import (
    MOST_RECORDS,
    AuditTrail,
    Overview,
    audit_of,
    overview_of,
)
from safelora_vllm.integration.server.readiness import Readiness
from safelora_vllm.integration.server.route_parts import (
    CHANGES,
    BoundedRoute,
    Caller,
    Managed,
    Recorded,
    Shown,
)
from safelora_vllm.integration.server.schemas import (
    AdapterList,
    AdapterReport,
    ExamOverride,
    PolicyChange,
    ReExamination,
    Removed,
    RemovedVersion,
    Rollback,
    VersionList,
    exam_figures,
    version_info,
)
from safelora_vllm.integration.server.usage import TenantUsage
from safelora_vllm.integration.server.visibility import visible

router = APIRouter(tags=["safelora"], route_class=BoundedRoute)
router.include_router(loading_routes.router)


@router.get("/v1/adapters", response_model=AdapterList, responses=documented(401, 503))
async def list_adapters(who: Caller, shown: Shown) -> Any:
    """All adapters that the caller may use; the modules of each are in its own report."""
    entries = visible(shown.reconciler.registry, who).values()
    return {"exam": shown.exam(who), "data": [shown.summary(entry) for entry in entries if entry.served]}


@router.get(
    "/v1/adapters/{name:path}/versions", response_model=VersionList, responses=documented(401, 404, 503)
)
async def list_versions(name: str, who: Caller, shown: Shown) -> Any:
    """What has been served under a name."""
    record = await shown.versions(who, name)
    versions = [version_info(version) for version in record.versions]
    return {"name": name, "current": record.current, "versions": versions}


@router.post(
    "/v1/adapters/{name:path}/rollback",
    response_model=AdapterReport,
    responses=CHANGES,
)
async def roll_back(
    name: str, body: Rollback, who: Caller, managed: Managed, shown: Shown, request: Request
) -> Any:
    """Serve an earlier version's content again, as a new version."""
    with request.app.state.safelora_upload_limiter.take(who.tenant):
        return shown.report(who, await managed.roll_back(who, name, body.version))


@router.put("/v1/adapters/{name:path}/policy", response_model=AdapterReport, responses=CHANGES)
async def set_policy(name: str, body: PolicyChange, who: Caller, managed: Managed, shown: Shown) -> Any:
    """Judge an adapter by other rules than the server's, from what was uploaded."""
    entry = await managed.set_policy(who, name, body.policy, body.override, body.reason)
    return shown.report(who, entry)


@router.post("/v1/adapters/{name:path}/exam", response_model=ReExamination, responses=CHANGES)
async def examine_again(name: str, who: Caller, managed: Managed, shown: Shown, request: Request) -> Any:
    """Examine what a name serves with the held-out half of the probes. With ``--exam enforce``, what fails is
    withdrawn."""
    with request.app.state.safelora_upload_limiter.take(who.tenant):
        entry = shown.find(who, name)
        outcome = await managed.reconciler.again.examine(entry, who.key_id)
    threshold = managed.reconciler.copies.exam.terms(name).threshold
    about = {"adapter": name, "probes": outcome.found.score.probes, "threshold": threshold}
    decided = {field: getattr(outcome, field) for field in ("passed", "by_opinion", "withdrawn")}
    return {**exam_figures(outcome.found, shown=True), **about, **decided}


@router.put("/v1/adapters/{name:path}/exam", response_model=AdapterReport, responses=CHANGES)
async def override_exam(name: str, body: ExamOverride, who: Caller, managed: Managed, shown: Shown) -> Any:
    """Serve an adapter whatever its exam says, for this content only; or take that back."""
    return shown.report(who, await managed.set_exam_override(who, name, body.override, body.reason))


@router.get(
    "/v1/adapters/{name:path}", response_model=AdapterReport, responses=documented(401, 404, 422, 503)
)
async def get_adapter(name: str, who: Caller, shown: Shown) -> Any:
    """The report of one served adapter."""
    return shown.report(who, shown.find(who, name))


@router.delete("/v1/adapters/{name:path}/versions/{number}", response_model=RemovedVersion, responses=CHANGES)
async def delete_version(name: str, number: int, who: Caller, managed: Managed) -> Any:
    """Forget an old version of an adapter, which then does not count any more. Not the one that is served."""
    await managed.remove_version(who, name, number)
    return {"id": name, "version": number}


@router.get("/v1/usage", response_model=TenantUsage, responses=documented(400, 401, 403, 503))
async def get_usage(who: Caller, shown: Shown, tenant: str | None = None) -> Any:
    """A tenant's quota, what it uses of it, and what was refused of late. Admins name the tenant."""
    return await shown.usage(who, tenant)


@router.get("/v1/overview", response_model=Overview, responses=documented(401, 503))
async def get_overview(who: Caller, managed: Managed, shown: Shown) -> Any:
    """All adapters that the caller may use, served or not, and what the caller may do."""
    return await overview_of(shown, who, managed.max_adapter_bytes)


@router.get("/v1/audit", response_model=AuditTrail, responses=documented(400, 401, 403, 503))
async def get_audit(
    who: Caller,
    shown: Shown,
    adapter: str | None = None,
    decision: Recorded | None = None,
    limit: Annotated[int, Query(ge=1, le=MOST_RECORDS)] = 50,
) -> Any:
    """The newest decisions about adapters that the caller may change."""
    return await audit_of(shown, who, adapter, decision, limit)


@router.delete("/v1/adapters/{name:path}", response_model=Removed, responses=CHANGES)
async def delete_adapter(name: str, who: Caller, managed: Managed) -> Any:
    """Stop serving an adapter, on every server, and forget its versions. Running requests end on it."""
    await managed.remove(who, name)
    return {"id": name}


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """vLLM's metrics and ours."""
    state = request.app.state
    text = without_hidden((await asyncio.to_thread(generate_latest, get_prometheus_registry())).decode())
    current: Metrics | None = getattr(state, "safelora_metrics", None)
    if current is not None:
        text += await current.text(state.safelora_upload_limiter.held)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@router.get(
    "/safelora/ready", response_model=Readiness, responses={**documented(400), 503: {"model": Readiness}}
)
async def ready(request: Request, strict: bool = False) -> JSONResponse:
    """Whether this server is to get traffic: 200, or 503 with the problems. For probes: needs no key.
    With strict also whether adapters can be changed: gate and store are in order."""
    current: Metrics | None = getattr(request.app.state, "safelora_metrics", None)
    if current is None:
        raise without_lora()
    answer = (await current.readiness.findings()).answer(strict)
    return JSONResponse(answer.model_dump(), 200 if answer.ready else 503)
