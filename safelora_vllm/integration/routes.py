"""Our HTTP routes. Bodies are vLLM's, errors have OpenAI's form with the reasons added."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from vllm.v1.metrics.prometheus import get_prometheus_registry

from safelora_vllm.errors import (
    AdapterNotFound,
    AdapterRefused,
    GateUnavailable,
    SafeLoRAError,
    UsageError,
)
from safelora_vllm.integration.serving import AlreadyLoaded, Serving, UnknownAdapter


class LoadRequest(BaseModel):
    """vLLM's body of ``POST /v1/load_lora_adapter``."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(BaseModel):
    """vLLM's body of ``POST /v1/unload_lora_adapter``."""

    lora_name: str
    lora_int_id: int | None = None


class NotServing(SafeLoRAError):
    """This server was started without LoRA."""


class Unauthorized(SafeLoRAError):
    """The admin key is missing or wrong."""


_STATUS: dict[type[SafeLoRAError], tuple[int, str]] = {
    Unauthorized: (401, "AuthenticationError"),
    UnknownAdapter: (404, "NotFoundError"),
    AdapterNotFound: (404, "NotFoundError"),
    AlreadyLoaded: (409, "ConflictError"),
    AdapterRefused: (422, "AdapterRefusedError"),
    UsageError: (400, "InvalidUserInput"),
    GateUnavailable: (503, "ServiceUnavailableError"),
    NotServing: (503, "ServiceUnavailableError"),
}


def error_response(error: SafeLoRAError) -> JSONResponse:
    """An OpenAI-style error. A refusal also lists its codes and sentences."""
    status, kind = next(
        (answer for cls, answer in _STATUS.items() if isinstance(error, cls)),
        (500, "InternalServerError"),
    )
    body: dict[str, Any] = {"message": str(error), "type": kind, "param": None, "code": status}
    if isinstance(error, AdapterRefused):
        body["reasons"] = error.codes
        body["details"] = [reason.detail for reason in error.reasons]
    return JSONResponse({"error": body}, status_code=status)


def build_router(admin_key: str) -> APIRouter:
    """The routes; those that change anything ask for ``admin_key`` as a bearer token."""
    router = APIRouter(tags=["safelora"])

    def require_admin(authorization: str = Header(default="")) -> None:
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.encode(), admin_key.encode()):
            raise Unauthorized("loading and unloading need the admin key as 'Authorization: Bearer …'")

    admin = [Depends(require_admin)]

    @router.post("/v1/load_lora_adapter", dependencies=admin)
    async def load_lora_adapter(body: LoadRequest, request: Request) -> Response:
        """Vet and project an adapter folder on the server, and serve it."""
        await serving(request).load(body.lora_name, body.lora_path, replace=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", dependencies=admin)
    async def unload_lora_adapter(body: UnloadRequest, request: Request) -> Response:
        """Stop serving an adapter and free its weights."""
        await serving(request).unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @router.get("/v1/adapters")
    async def list_adapters(request: Request) -> dict[str, Any]:
        """Reports of all served adapters."""
        served = serving(request).served.values()
        return {"object": "list", "data": [adapter.report.to_dict() for adapter in served]}

    @router.get("/v1/adapters/{name}")
    async def get_adapter(name: str, request: Request) -> dict[str, Any]:
        """The report of one served adapter."""
        adapter = serving(request).served.get(name)
        if adapter is None:
            raise UnknownAdapter(f"no adapter {name!r:.200} is loaded")
        return adapter.report.to_dict()

    @router.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        """vLLM's metrics and ours."""
        text = generate_latest(get_prometheus_registry()).decode()
        current = getattr(request.app.state, "safelora", None)
        if current is not None:
            text += await asyncio.to_thread(current.metrics)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return router


def serving(request: Request) -> Serving:
    """The serving state of this process.

    Raises:
        NotServing: the server runs without LoRA.
    """
    current: Serving | None = getattr(request.app.state, "safelora", None)
    if current is None:
        raise NotServing("this server was started without LoRA; start it with --enable-lora")
    return current
