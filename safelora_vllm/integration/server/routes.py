"""Our HTTP routes. Bodies are vLLM's where vLLM has the route, errors have OpenAI's form."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.types import Message
from vllm.v1.metrics.prometheus import get_prometheus_registry

from safelora_vllm.errors import AlreadyLoaded, Forbidden, GuardError, UnknownAdapter
from safelora_vllm.integration.server.callers import caller
from safelora_vllm.integration.server.changes import Manager
from safelora_vllm.integration.server.exam.hidden_name import without_hidden
from safelora_vllm.integration.server.http_errors import NotServing, documented
from safelora_vllm.integration.server.lora_paths import adapter_at
from safelora_vllm.integration.server.metrics import Metrics
from safelora_vllm.integration.server.overview import (
    MOST_RECORDS,
    AuditTrail,
    Overview,
    audit_of,
    overview_of,
)
from safelora_vllm.integration.server.readiness import Readiness
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.remote_sources import add_from_source, source_named
from safelora_vllm.integration.server.repeated import LOAD, live_number
from safelora_vllm.integration.server.schemas import (
    UPLOAD_BODY,
    AdapterList,
    AdapterReport,
    ExamOverride,
    LoadRequest,
    PolicyChange,
    ReExamination,
    Removed,
    RemovedVersion,
    Rollback,
    UnloadRequest,
    UploadByPath,
    UploadFromSource,
    VersionList,
    exam_figures,
    summary_of,
    version_info,
)
from safelora_vllm.integration.server.uploads import TooLarge, download, incoming, read_with_timeout, receive
from safelora_vllm.integration.server.usage import TenantUsage
from safelora_vllm.integration.server.views import Views
from safelora_vllm.integration.server.visibility import visible
from safelora_vllm.integration.server.vllm_answers import already_loaded, not_found
from safelora_vllm.remote.address import is_remote
from safelora_vllm.tenants.principal import Principal

_MAX_JSON = 64 * 1024
_CHANGES = documented(400, 401, 403, 404, 409, 422, 503)
_PLAIN = {**_CHANGES, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


def identified() -> Principal:
    """The caller. Whether they may call the route was decided before, by `access_check`.

    Raises:
        GuardError: nobody asked, as the middleware is not there.
    """
    principal = caller()
    if principal is None:
        raise GuardError("a request came past the middleware that checks keys; nothing is done")
    return principal


def manager(request: Request) -> Manager:
    """The management of this process.

    Raises:
        NotServing: the server runs without LoRA.
    """
    current: Manager | None = getattr(request.app.state, "safelora_manager", None)
    if current is None:
        raise NotServing("this server was started without LoRA; start it with --enable-lora")
    return current


def answers(request: Request) -> Views:
    """What this process shows of what it serves.

    Raises:
        NotServing: the server runs without LoRA.
    """
    manager(request)
    found: Views = request.app.state.safelora_views
    return found


Caller = Annotated[Principal, Depends(identified)]
Managed = Annotated[Manager, Depends(manager)]
Shown = Annotated[Views, Depends(answers)]
Decision = Literal["accepted", "refused", "removed", "unchanged"]


class BoundedRoute(APIRoute):
    """A route whose JSON bodies are short. FastAPI reads a body before it looks for a key."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            multipart = request.headers.get("content-type", "").startswith("multipart/")
            if multipart and self.endpoint is upload_adapter:
                return await handler(request)
            left = _MAX_JSON

            async def receive() -> Message:
                nonlocal left
                message = await request.receive()
                left -= len(message.get("body", b""))
                if left < 0:
                    raise TooLarge(f"a JSON body has at most {_MAX_JSON:,} bytes")
                return message

            if int(request.headers.get("content-length") or 0) > _MAX_JSON:
                raise TooLarge(f"a JSON body has at most {_MAX_JSON:,} bytes")
            return await handler(Request(request.scope, receive))

        return bounded


router = APIRouter(tags=["safelora"], route_class=BoundedRoute)


@router.post("/v1/load_lora_adapter", response_model=None, responses={**_PLAIN, **documented(429, 502)})
async def load_lora_adapter(body: LoadRequest, who: Caller, managed: Managed, request: Request) -> Response:
    """Vet and project an adapter on the server or in a bucket, keep it, and serve it. vLLM's own call."""
    name, replace = body.lora_name, body.load_inplace
    try:
        managed.check(who, name)
        if is_remote(body.lora_path):
            wanted = UploadFromSource.model_construct(name=name, source=body.lora_path, digest=None)
            with request.app.state.safelora_upload_limiter.take(who.tenant):
                await add_from_source(request, who, managed, wanted, replace=replace, action=LOAD)
        else:
            async with adapter_at(managed, body.lora_path) as source:
                await managed.add(who, name, source, replace=replace, action=LOAD)
    except AlreadyLoaded as error:
        return already_loaded(name, str(error))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_model=None, responses=_PLAIN)
async def unload_lora_adapter(body: UnloadRequest, who: Caller, managed: Managed) -> Response:
    """Stop serving an adapter and free its weights. vLLM's own call."""
    try:
        await managed.remove(who, body.lora_name, action="unload")
    except UnknownAdapter:
        return not_found(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.post(
    "/v1/adapters",
    status_code=201,
    response_model=AdapterReport,
    responses={**_CHANGES, **documented(408, 413, 429, 502), 200: {"model": AdapterReport}},
    openapi_extra={"requestBody": UPLOAD_BODY},
)
async def upload_adapter(
    who: Caller,
    managed: Managed,
    shown: Shown,
    request: Request,
    answer: Response,
    replace: bool = False,
    exam_override: Annotated[str, Query(max_length=1000)] = "",
) -> Any:
    """Upload an adapter; it is served when this answers. Replacing is a hot swap: running requests end on
    the old weights, later ones use the new. The same content under the same name again is 200.
    exam_override is an admin's reason to serve it whatever its exam says."""
    managed.check_override(who, exam_override)
    how = _How(replace, exam_override)
    with request.app.state.safelora_upload_limiter.take(who.tenant):
        if request.headers.get("content-type", "").startswith("application/json"):
            return shown.report(who, await _add_named(who, managed, request, answer, how))
        async with incoming(managed.reconciler.names.root) as folder:
            may_use = functools.partial(managed.check, who)
            received = await receive(request, folder, managed.max_adapter_bytes, may_use)
            source = folder
            if hub_id := received.fields.get("hub_id"):
                if not managed.hub or received.parts:
                    raise Forbidden("adapters come from the hub only with --allow-hub, and without files")
                revision = received.fields.get("revision")
                most, token = managed.max_adapter_bytes, who.kind == "admin"
                await asyncio.to_thread(download, hub_id, revision, folder, most, token)
            else:
                source = received.adapter
            entry = await _add(who, managed, received.fields["name"], source, answer, how)
            return shown.report(who, entry)


class _How(NamedTuple):
    """What the query of an upload says."""

    replace: bool
    exam_override: str


async def _add_named(
    who: Principal, managed: Manager, request: Request, answer: Response, how: _How
) -> Entry:
    """An upload whose JSON body says where the adapter is."""
    text = b"".join([chunk async for chunk in read_with_timeout(request)])
    if wanted := source_named(text):
        before = live_number(managed.reconciler, wanted.name)
        entry = await add_from_source(request, who, managed, wanted, **how._asdict())
        return _again(managed, wanted.name, before, answer, entry)
    if who.kind != "admin" or not managed.roots:
        raise Forbidden("loading by path needs an admin key and a server with --adapter-root")
    try:
        body = UploadByPath.model_validate_json(text)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False, include_url=False)) from error
    source = managed.check_root(body.path)
    return await _add(who, managed, body.name, source, answer, how)


async def _add(
    who: Principal, managed: Manager, name: str, source: Path, answer: Response, how: _How
) -> Entry:
    """Add an adapter. The status is 200 where the name has this very content already."""
    before = live_number(managed.reconciler, name)
    return _again(managed, name, before, answer, await managed.add(who, name, source, **how._asdict()))


def _again(managed: Manager, name: str, before: int | None, answer: Response, entry: Entry) -> Entry:
    if live_number(managed.reconciler, name) == before:
        answer.status_code = 200
    return entry


@router.get("/v1/adapters", response_model=AdapterList, responses=documented(401, 503))
async def list_adapters(who: Caller, shown: Shown) -> Any:
    """All adapters that the caller may use; the modules of each are in its own report."""
    entries = visible(shown.reconciler.registry, who).values()
    return {"exam": shown.exam(who), "data": [summary_of(entry) for entry in entries if entry.served]}


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
    responses={**_CHANGES, **documented(429)},
)
async def roll_back(
    name: str, body: Rollback, who: Caller, managed: Managed, shown: Shown, request: Request
) -> Any:
    """Serve an earlier version's content again, as a new version."""
    with request.app.state.safelora_upload_limiter.take(who.tenant):
        return shown.report(who, await managed.roll_back(who, name, body.version))


@router.put("/v1/adapters/{name:path}/policy", response_model=AdapterReport, responses=_CHANGES)
async def set_policy(name: str, body: PolicyChange, who: Caller, managed: Managed, shown: Shown) -> Any:
    """Judge an adapter by other rules than the server's, from what was uploaded."""
    entry = await managed.set_policy(who, name, body.policy, body.override, body.reason)
    return shown.report(who, entry)


@router.post(
    "/v1/adapters/{name:path}/exam", response_model=ReExamination, responses={**_CHANGES, **documented(429)}
)
async def examine_again(name: str, who: Caller, managed: Managed, shown: Shown, request: Request) -> Any:
    """Examine what a name serves with the held-out half of the probes. With ``--exam enforce``, what fails is
    withdrawn."""
    with request.app.state.safelora_upload_limiter.take(who.tenant):
        entry = shown.find(who, name)
        found, passed, withdrawn = await managed.reconciler.again.examine(entry, who.key_id)
    threshold = managed.reconciler.copies.exam.terms(name).threshold
    about = {"adapter": name, "probes": found.score.probes, "threshold": threshold}
    return {**exam_figures(found, shown=True), **about, "passed": passed, "withdrawn": withdrawn}


@router.put("/v1/adapters/{name:path}/exam", response_model=AdapterReport, responses=_CHANGES)
async def override_exam(name: str, body: ExamOverride, who: Caller, managed: Managed, shown: Shown) -> Any:
    """Serve an adapter whatever its exam says, for this content only; or take that back."""
    return shown.report(who, await managed.set_exam_override(who, name, body.override, body.reason))


@router.get(
    "/v1/adapters/{name:path}", response_model=AdapterReport, responses=documented(401, 404, 422, 503)
)
async def get_adapter(name: str, who: Caller, shown: Shown) -> Any:
    """The report of one served adapter."""
    return shown.report(who, shown.find(who, name))


@router.delete(
    "/v1/adapters/{name:path}/versions/{number}", response_model=RemovedVersion, responses=_CHANGES
)
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
    decision: Decision | None = None,
    limit: Annotated[int, Query(ge=1, le=MOST_RECORDS)] = 50,
) -> Any:
    """The newest decisions about adapters that the caller may change."""
    return await audit_of(shown, who, adapter, decision, limit)


@router.delete("/v1/adapters/{name:path}", response_model=Removed, responses=_CHANGES)
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
        raise NotServing("this server was started without LoRA; start it with --enable-lora")
    answer = (await current.readiness.findings()).answer(strict)
    return JSONResponse(answer.model_dump(), 200 if answer.ready else 503)
