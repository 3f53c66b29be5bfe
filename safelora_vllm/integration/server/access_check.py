"""Whether a caller may make a request: the check of `access_rules`, closed by default.

What a request asks for is decided by the server's own router, not by comparing paths: the entry in the
table is that of the route that would run. Imports no vllm.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from starlette.routing import BaseRoute, Match, Mount, Route, WebSocketRoute
from starlette.types import Scope

from safelora_vllm.errors import (
    Forbidden,
    GuardError,
    SafeLoRAError,
    Unauthorized,
    UnknownRoute,
    UsageError,
)
from safelora_vllm.integration.server.access_rules import REFUSED, TABLE, Access, Refusal
from safelora_vllm.tenants.principal import Kind, Principal

_ANY_KEY: frozenset[Kind] = frozenset(("admin", "tenant", "inference", "metrics"))
_EVERYBODY: frozenset[Kind] = _ANY_KEY | {"anonymous", "stranger"}
_MAY: dict[Access, frozenset[Kind]] = {
    Access.ANYBODY: _EVERYBODY,
    Access.DOCS: _EVERYBODY,
    Access.METRICS: _EVERYBODY,
    Access.USERS: frozenset(("admin", "tenant", "inference", "anonymous")),
    Access.TENANTS: frozenset(("admin", "tenant")),
    Access.MONITORS: frozenset(("admin", "metrics")),
    Access.ADMINS: frozenset(("admin",)),
}
_NEEDED = {
    Access.DOCS: "a key",
    Access.METRICS: "the metrics key or an admin key",
    Access.USERS: "a key that may use models",
    Access.TENANTS: "an admin or a tenant key",
    Access.MONITORS: "the metrics key or an admin key",
    Access.ADMINS: "an admin key",
}

# What an operator may give a route that is not in the table, by the name that settings use.
_GRANTS = {"anybody": Access.ANYBODY, "users": Access.USERS, "tenants": Access.TENANTS}
_ROUTE_NAME = re.compile(r"(GET|POST|PUT|PATCH|DELETE|WEBSOCKET) /\S*|\* /\S+/\*")


class MethodNotAllowed(SafeLoRAError):
    """The path has routes, but none for this method. methods: those that the caller may use."""

    def __init__(self, method: str, path: str, methods: Sequence[str]) -> None:
        super().__init__(f"{method} is not a valid method of {path!r:.200}: expected {', '.join(methods)}")
        self.methods = methods


@dataclass(frozen=True)
class RouteAccess:
    """The check of one server; all requests share one instance.

    guarding: whether adapters are guarded (``--enable-lora``), so that `REFUSED` holds. private_metrics: a
    metrics key is set. private_docs: the API's documentation needs a key. more: entries besides `TABLE`.
    """

    guarding: bool = True
    private_metrics: bool = False
    private_docs: bool = False
    more: Mapping[str, Access] = field(default_factory=dict)

    def check(self, principal: Principal, routes: Sequence[BaseRoute], scope: Scope) -> Refusal | None:
        """Whether a caller may make this request of a server with these routes.

        Returns:
            What may still stand against the request: it depends on query and body. None for most routes.

        Raises:
            Unauthorized: no key, or one that may not do this. Forbidden: a tenant's key that may not.
            UnknownRoute, MethodNotAllowed: nothing would run, and the caller may use models.
        """
        name = find(routes, scope)
        if name is None and scope.get("method") == "OPTIONS":
            return None  # a browser's preflight, which has no key: CORS middleware or a 405 answers it
        if name is None and principal.kind in self.may(Access.USERS):
            if methods := self._other_methods(principal, routes, scope):
                raise MethodNotAllowed(_method(scope), scope["path"], methods)
            raise UnknownRoute(f"there is no {_method(scope)} {scope['path']!r:.200} on this server")
        access = self.access(name) if name else Access.ADMINS
        if principal.kind not in self.may(access):
            raise _denied(principal, access, scope)
        return REFUSED.get(name) if name and self.guarding else None

    def _other_methods(self, principal: Principal, routes: Sequence[BaseRoute], scope: Scope) -> list[str]:
        """By which the caller may call the path."""
        same_path = [
            route for route in routes if isinstance(route, Route) and route.matches(scope)[0] is Match.PARTIAL
        ]
        return sorted(
            {
                method
                for route in same_path
                for method in route.methods or ()
                if principal.kind
                in self.may(self.access(name_of(route, _method({**scope, "method": method}))))
            }
        )

    def uses_models(self, principal: Principal, routes: Sequence[BaseRoute], scope: Scope) -> bool:
        """Whether a request goes to a route of whoever may use models, from one who may."""
        if principal.kind not in self.may(Access.USERS):
            return False
        name = find(routes, scope)
        return name is not None and self.access(name) is Access.USERS

    def access(self, name: str) -> Access:
        """What a route needs: its entry in `TABLE`, or the operator's, or else an admin key."""
        return TABLE.get(name) or self.more.get(name, Access.ADMINS)

    def may(self, access: Access) -> frozenset[Kind]:
        """The kinds of callers that have this access here."""
        if access is Access.METRICS and self.private_metrics:
            return _MAY[Access.MONITORS]
        if access is Access.DOCS and self.private_docs:
            return _ANY_KEY
        return _MAY[access]


def granted(entries: Mapping[str, str]) -> dict[str, Access]:
    """An operator's entries for routes of their own plugins, "METHOD /path" → who may.

    Raises:
        UsageError: not the form of a route, not one of the words, or a route that has its entry in `TABLE`.
    """
    for name, word in entries.items():
        if not _ROUTE_NAME.fullmatch(name):
            raise UsageError(
                f"{name!r:.200} is not a valid route: expected METHOD /path as the application has it, with "
                "GET, POST, PUT, PATCH, DELETE or WEBSOCKET, or '* /prefix/*' for a mounted application"
            )
        if word not in _GRANTS:
            raise UsageError(f"{word!r:.80} is not who may call {name}: use {', '.join(_GRANTS)}")
        if name in TABLE:
            raise UsageError(f"{name} has its access already: {TABLE[name].value}. Leave it out")
    return {name: _GRANTS[word] for name, word in entries.items()}


def find(routes: Sequence[BaseRoute], scope: Scope) -> str | None:
    """The table's name of the route that runs for a request, or to which the router redirects it.

    None: nothing would run. Source: ``Router.app`` in ``starlette/routing.py``.
    """
    for route in routes:
        if route.matches(scope)[0] is Match.FULL:
            return name_of(route, _method(scope))
    path: str = scope["path"]
    if scope["type"] == "http" and not any(route.matches(scope)[0] is Match.PARTIAL for route in routes):
        toggled = {**scope, "path": path.rstrip("/") if path.endswith("/") else f"{path}/"}
        for route in routes:
            if route.matches(toggled)[0] is Match.FULL:
                return name_of(route, _method(scope))
    return None


def check_routes(routes: Sequence[BaseRoute]) -> None:
    """Whether `find` understands the routes of this server's web framework.

    Raises:
        GuardError: it does not find ours, so that every route would need an admin key.
    """
    found = find(routes, {"type": "http", "method": "GET", "path": "/v1/adapters"})
    if found not in TABLE:
        raise GuardError(
            f"GET /v1/adapters is {found} to the server's router (seam 'routes'), so routes cannot be told "
            "apart and nothing is served. Install the FastAPI that vLLM asks for"
        )


def name_of(route: BaseRoute, method: str) -> str:
    """What a route is called in `TABLE`. Kinds of routes that are not known here are not listed there."""
    if isinstance(route, Mount):
        return f"* {route.path}/*"
    if isinstance(route, Route | WebSocketRoute):
        return f"{method} {route.path}"
    return f"{method} {type(route).__name__}"


def _method(scope: Scope) -> str:
    if scope["type"] == "websocket":
        return "WEBSOCKET"
    return "GET" if scope["method"] == "HEAD" else str(scope["method"])


def _denied(principal: Principal, access: Access, scope: Scope) -> SafeLoRAError:
    sentence = f"this route needs {_NEEDED[access]}: send it as 'Authorization: Bearer KEY'"
    sent = any(
        name == b"authorization" and value[:7].lower() == b"bearer " for name, value in scope["headers"]
    )
    if sent and principal.kind in ("stranger", "anonymous"):
        sentence += ". The one that was sent is unknown here, or no longer in force"
    return Forbidden(sentence) if principal.kind == "tenant" else Unauthorized(sentence)
