"""The door of the server: the ASGI middleware through which every request goes, to vLLM's routes and to ours.

It stands outside of vLLM's own key check. It decides once per request who the caller is and whether they
may call the route. A caller with an admin or a tenant key goes on with a key that vLLM knows (made at start,
never leaves the process), so that vLLM's check stays what it is. It also brings the registry up to date
with the adapter store, so that a change acknowledged by another API server is in force for every request
that begins later.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from safelora_vllm.errors import Forbidden, SafeLoRAError, UsageError
from safelora_vllm.integration.json_logs import about_request
from safelora_vllm.integration.server.access_check import RouteAccess
from safelora_vllm.integration.server.access_rules import Refusal
from safelora_vllm.integration.server.admin_socket import by_socket
from safelora_vllm.integration.server.callers import acting_as
from safelora_vllm.integration.server.first_request import replayed, wait_until_ready
from safelora_vllm.integration.server.http_errors import error_response
from safelora_vllm.tenants.keys import KeyRing

_MAX_BODY = 64 * 1024  # of the requests whose body is looked at


@dataclass(frozen=True)
class Door:
    """At ``app.state.safelora_door``. inner_key: what vLLM's key check is shown for our callers."""

    keys: KeyRing
    inner_key: str
    access: RouteAccess


class AccessMiddleware:
    """Added to vLLM's ``--middleware`` list, whose entries stand outside of its own key check."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Identify the caller, then answer that they may not do this, or pass the request on."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        app = scope["app"]
        door: Door = app.state.safelora_door
        headers = Headers(scope=scope)
        local = None if "Authorization" in headers else by_socket(scope)  # a key says who it is
        identify = functools.partial(door.keys.identify, bearer_token(headers))
        principal = local or identify()
        with (
            acting_as(principal, None if local else identify),
            about_request(headers.get("X-Request-Id"), principal.tenant),
        ):
            try:
                refusal = door.access.check(principal, app.router.routes, scope)
                if refusal is not None:
                    receive = await _unless_refused(refusal, scope, receive)
            except SafeLoRAError as error:
                return await error_response(error)(scope, receive, send)
            if principal.kind in ("admin", "tenant"):
                scope = dict(scope)  # Starlette gives it a list of headers of its own
                MutableHeaders(scope=scope)["Authorization"] = f"Bearer {door.inner_key}"
            reconciler = getattr(app.state, "safelora", None)
            if reconciler is not None:
                await reconciler.refresh()
                routes = app.router.routes
                if reconciler.served.unready and door.access.uses_models(principal, routes, scope):
                    receive = await wait_until_ready(reconciler, principal, scope, receive)
            await self.app(scope, receive, send)


def bearer_token(headers: Headers) -> str | None:
    """The token of ``Authorization: Bearer TOKEN``."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" and token else None


async def _unless_refused(refusal: Refusal, scope: Scope, receive: Receive) -> Receive:
    """What the request is read from afterwards.

    Raises:
        Forbidden: the request does what may not be done while adapters are guarded. UsageError: its body is
        too large, or no JSON.
    """
    body: object = None
    if refusal.reads_body:
        text = await _read(scope, receive)
        receive = replayed([{"type": "http.request", "body": text, "more_body": False}], receive)
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the body is not JSON: {error}") from None
    if not refusal.harmless(QueryParams(scope["query_string"]), body):
        raise Forbidden(f"refused while adapters are guarded: {refusal.reason}")
    return receive


async def _read(scope: Scope, receive: Receive) -> bytes:
    text = b""
    async for chunk in Request(scope, receive).stream():
        text += chunk
        if len(text) > _MAX_BODY:
            raise UsageError(f"the body of this request has at most {_MAX_BODY:,} bytes")
    return text
