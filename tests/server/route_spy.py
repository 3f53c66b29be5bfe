"""An ASGI middleware for tests, inside of the server's own: it tells what came through, and adds routes.

    --middleware=tests.server.route_spy.RouteSpy

A request with the header ``x-spy`` that comes through is answered here, so that no route does anything.
``x-spy: routes`` gives every route that the application has, with three that nobody listed.
"""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send

PASSED = 299  # nobody else's status


async def invented(_: Any) -> PlainTextResponse:
    return PlainTextResponse("invented")


INVENTED: list[BaseRoute] = [
    Route("/invented", invented, methods=["GET", "POST"]),
    Route("/v1/invented", invented),
    Mount("/invented-mount", app=Starlette(routes=[Route("/inner", invented)])),
    WebSocketRoute("/invented-socket", invented),
]


class RouteSpy:
    """See above."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer for the application, if asked to."""
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        routes = scope["app"].router.routes
        if (asked := Headers(scope=scope).get("x-spy")) == "routes":
            routes.extend(route for route in INVENTED if route not in routes)
            await JSONResponse([described(route) for route in routes])(scope, receive, send)
        elif asked is not None:
            await PlainTextResponse("passed", PASSED)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def described(route: BaseRoute) -> dict[str, Any]:
    """Kind, path and methods."""
    methods = sorted(getattr(route, "methods", None) or [])
    return {"kind": type(route).__name__, "path": getattr(route, "path", ""), "methods": methods}
