"""What our routes share: who calls, the management, and a bound on JSON bodies."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import Depends, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.types import Message

from safelora_vllm.errors import GuardError
from safelora_vllm.integration.server.callers import caller
from safelora_vllm.integration.server.changes import Manager
from safelora_vllm.integration.server.http_errors import documented, without_lora
from safelora_vllm.integration.server.uploads import TooLarge
from safelora_vllm.integration.server.views import Views
from safelora_vllm.tenants.principal import Principal

UPLOADS = "/v1/adapters"  # the only route whose body may be long
CHANGES = documented(400, 401, 403, 404, 409, 422, 429, 503)  # the answers of routes that change something
_MAX_JSON = 64 * 1024


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
        raise without_lora()
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
Recorded = Literal["accepted", "refused", "removed", "unchanged", "unknown"]  # DECISIONS of the audit log


class BoundedRoute(APIRoute):
    """A route whose JSON bodies are short. FastAPI reads a body before it looks for a key."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            multipart = request.headers.get("content-type", "").lower().startswith("multipart/")
            if multipart and self.path == UPLOADS:
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
