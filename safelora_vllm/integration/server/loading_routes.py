"""Routes by which adapters come and go: vLLM's own two calls, and uploads."""

from __future__ import annotations

import asyncio
import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from pydantic import ValidationError

from safelora_vllm.errors import AlreadyLoaded, Forbidden, UnknownAdapter
from safelora_vllm.integration.server.changes import Manager
from safelora_vllm.integration.server.http_errors import documented
from safelora_vllm.integration.server.lora_paths import adapter_at, is_hub_id
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.remote_sources import add_from_source, source_named
from safelora_vllm.integration.server.repeated import LOAD, live_number
from safelora_vllm.integration.server.route_parts import (
    CHANGES,
    UPLOADS,
    BoundedRoute,
    Caller,
    Managed,
    Shown,
)
from safelora_vllm.integration.server.schemas import (
    UPLOAD_BODY,
    AdapterReport,
    LoadRequest,
    UnloadRequest,
    UploadByPath,
    UploadFromSource,
)
from safelora_vllm.integration.server.uploads import downloaded, incoming, read_with_timeout, receive
from safelora_vllm.integration.server.vllm_answers import already_loaded, not_found
from safelora_vllm.remote.address import is_remote
from safelora_vllm.tenants.principal import Principal

_PLAIN = {**CHANGES, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


router = APIRouter(route_class=BoundedRoute)


@router.post("/v1/load_lora_adapter", response_model=None, responses={**_PLAIN, **documented(429, 502)})
async def load_lora_adapter(body: LoadRequest, who: Caller, managed: Managed, request: Request) -> Response:
    """Vet and project an adapter on the server or in a bucket, keep it, and serve it. vLLM's own call."""
    name, replace = body.lora_name, body.load_inplace
    try:
        managed.check(who, name)
        is_far = is_remote(body.lora_path)
        limiter = request.app.state.safelora_upload_limiter
        downloads = is_far or await asyncio.to_thread(is_hub_id, body.lora_path)
        with limiter.take(who.tenant) if downloads else nullcontext():
            if is_far:
                wanted = UploadFromSource.model_construct(name=name, source=body.lora_path, digest=None)
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
    UPLOADS,
    status_code=201,
    response_model=AdapterReport,
    responses={**CHANGES, **documented(408, 413, 502), 200: {"model": AdapterReport}},
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
        if request.headers.get("content-type", "").lower().startswith("application/json"):
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
                await downloaded(hub_id, revision, folder, most, token)
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
