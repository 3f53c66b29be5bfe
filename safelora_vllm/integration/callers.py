"""Who is calling, for every request of the server: the outermost ASGI middleware.

It stands before vLLM's own key check and decides once per request who the caller is. A caller with an
admin or a tenant key goes on with a key that vLLM knows (made at start, never leaves the process), so
that vLLM's check stays what it is. It also brings the serving map up to date with the adapter store, so
that a change acknowledged by another API server is in force for every request that begins later.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send

from safelora_vllm.access import KeyRing, Principal

_caller: ContextVar[Principal | None] = ContextVar("safelora_caller", default=None)


@dataclass(frozen=True)
class Access:
    """At ``app.state.safelora_access``. inner_key: what vLLM's key check is shown for our callers."""

    keys: KeyRing
    inner_key: str


def caller() -> Principal | None:
    """The caller of the request being answered; None in work that no request asked for."""
    return _caller.get()


@contextmanager
def acting_as(principal: Principal | None) -> Iterator[None]:
    """Answer for this caller until the block ends."""
    token = _caller.set(principal)
    try:
        yield
    finally:
        _caller.reset(token)


class CallerMiddleware:
    """Added to vLLM's ``--middleware`` list, whose entries stand outside of its own key check."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Identify the caller, then pass the request on."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        state = scope["app"].state
        access: Access = state.safelora_access
        principal = access.keys.identify(bearer_token(Headers(scope=scope)))
        if principal.kind in ("admin", "tenant"):
            scope = {**scope, "headers": list(scope["headers"])}
            MutableHeaders(scope=scope)["Authorization"] = f"Bearer {access.inner_key}"
        serving = getattr(state, "safelora", None)
        if serving is not None:
            await serving.refresh()
        with acting_as(principal):
            await self.app(scope, receive, send)


def bearer_token(headers: Headers) -> str | None:
    """The token of ``Authorization: Bearer TOKEN``."""
    scheme, _, token = headers.get("Authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" and token else None
