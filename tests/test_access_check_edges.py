"""The door at its edges: redirects, HEAD, schemes of keys, tenants, and requests that are read twice."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from safelora_vllm.errors import GuardError, UsageError
from safelora_vllm.integration.server.access_check import RouteAccess, check_routes, find, granted
from safelora_vllm.integration.server.callers import caller
from safelora_vllm.integration.server.middleware import AccessMiddleware, Door, bearer_token
from safelora_vllm.tenants.keys import KeyRing

ADMIN, INFERENCE, TENANT = (f"the {who} key of this test" for who in ("admin", "api", "acme"))
KINDS = {ADMIN: "admin", INFERENCE: "inference", TENANT: "tenant"}
CALL = b'{"method": "check_health"}'


def answer(_: object) -> JSONResponse:
    return JSONResponse({})


ROUTES: list[BaseRoute] = [
    Route("/get", answer, methods=["GET"]), Route("/get/", answer, methods=["POST"]),
    Route("/open/", answer, methods=["GET"]), Route("/X", answer, methods=["GET"]),
    WebSocketRoute("/socket", answer),
]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "name", "status"),
    [
        ("GET", "/get", "GET /get", 200), ("HEAD", "/get", "GET /get", 200),
        ("POST", "/get/", "POST /get/", 200),
        # The router knows the path, so it answers that the method is wrong and does not redirect.
        ("POST", "/get", None, 405), ("GET", "/get/", None, 405),
        # It redirects with the slash at the end, or without it.
        ("GET", "/open", "GET /open/", 307), ("HEAD", "/open", "GET /open/", 307),
        ("GET", "/X/", "GET /X", 307), ("GET", "/X//", "GET /X", 307),
        ("GET", "/none", None, 404), ("GET", "/none/", None, 404), ("GET", "/socket", None, 404),
    ],
)  # fmt: skip
def test_the_route_is_the_one_that_the_router_takes(
    method: str, path: str, name: str | None, status: int
) -> None:
    assert find(ROUTES, {"type": "http", "method": method, "path": path, "headers": []}) == name
    with TestClient(Starlette(routes=ROUTES)) as http:
        assert http.request(method, path, follow_redirects=False).status_code == status


def test_the_router_redirects_no_websocket() -> None:
    for path, name in (("/socket", "WEBSOCKET /socket"), ("/socket/", None), ("/get", None)):
        assert find(ROUTES, {"type": "websocket", "path": path, "headers": []}) == name


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        (
            "ANY /x",
            "users",
            "'ANY /x' is not a valid route: expected METHOD /path as the application has it, with GET, POST, "
            "PUT, PATCH, DELETE or WEBSOCKET, or '* /prefix/*' for a mounted application",
        ),
        ("GET /x", "all", "'all' is not who may call GET /x: use anybody, users, tenants"),
        ("GET /health", "users", "GET /health has its access already: anybody. Leave it out"),
    ],
)
def test_what_is_wrong_with_an_operator_s_route_is_said_in_full(name: str, word: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        granted({name: word})


def test_what_is_wrong_with_the_web_framework_is_said_in_full() -> None:
    with pytest.raises(GuardError) as error:
        check_routes([Route("/v1/{rest:path}", answer, methods=["GET"])])
    assert str(error.value) == (
        "GET /v1/adapters is GET /v1/{rest:path} to the server's router (seam 'routes'), so routes cannot be "
        "told apart and nothing is served. Install the FastAPI that vLLM asks for"
    )


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer a key", "a key"), ("bearer key", "key"), ("BEARER key", "key"), ("Bearer  key", " key"),
        ("Basic key", None), ("Bearerkey", None), ("key", None), (" key", None), ("Token key", None),
        ("Bearer", None), ("Bearer ", None), ("", None),
    ],
)  # fmt: skip
def test_a_key_has_the_scheme_bearer(header: str, token: str | None) -> None:
    assert bearer_token(Headers({"Authorization": header})) == token
    assert bearer_token(Headers({})) is None


class Inner:
    """The application behind the door: it notes who called with which key, and reads the request."""

    def __init__(self, reads: int = 1) -> None:
        self.reads = reads
        self.seen: list[Any] = []
        self.read: list[Any] = []
        self.served = SimpleNamespace(unready={})

    async def refresh(self) -> None:
        """As the reconciler's."""
        self.seen.append("refreshed")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        who = caller()
        self.seen.append((who and who.kind, Headers(scope=scope).get("Authorization")))
        self.read = [await receive() for _ in range(self.reads)]
        await JSONResponse({})(scope, receive, send)


@pytest.fixture
def keys(tmp_path: Path) -> KeyRing:
    file = tmp_path / "keys.toml"
    file.touch(0o600)
    file.write_text(f'[tenants.acme.keys]\nci = "{TENANT}"\n')
    return KeyRing.open(file, ADMIN, [INFERENCE])


def request(
    inner: Inner, keys: KeyRing, key: str, route: str, body: Iterable[bytes] = (b"",), scheme: str = "Bearer"
) -> tuple[int, Scope]:
    """The status of the answer, and the request as it is outside of the door afterwards."""
    method, path = route.split()
    state = SimpleNamespace(safelora_door=Door(keys, "the inner key", RouteAccess()), safelora=inner)
    routes = [Route(path, answer, methods=[method])]
    scope: Scope = {
        "type": "http", "method": method, "path": path, "query_string": b"",
        "headers": [(b"authorization", f"{scheme} {key}".encode())],
        "app": SimpleNamespace(state=state, router=SimpleNamespace(routes=routes)),
    }  # fmt: skip
    waiting: list[MutableMapping[str, Any]] = [
        {"type": "http.request", "body": piece, "more_body": True} for piece in body
    ]
    waiting[-1]["more_body"] = False
    waiting.append({"type": "http.disconnect"})
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return waiting.pop(0)

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    asyncio.run(AccessMiddleware(inner)(scope, receive, send))
    return sent[0]["status"], scope


@pytest.mark.parametrize("key", KINDS)
def test_callers_of_ours_go_on_with_the_inner_key_which_nobody_outside_sees(key: str, keys: KeyRing) -> None:
    inner = Inner()
    status, scope = request(inner, keys, key, "GET /v1/models")
    shown = key if key == INFERENCE else "the inner key"
    assert (status, inner.seen) == (200, ["refreshed", (KINDS[key], f"Bearer {shown}")])
    assert scope["headers"] == [(b"authorization", f"Bearer {key}".encode())]


def test_a_key_under_another_scheme_is_none(keys: KeyRing) -> None:
    for key in KINDS:
        assert request(inner := Inner(), keys, key, "GET /v1/models", scheme="Basic")[0] == 401
        assert inner.seen == [], "neither the store nor the application was asked"


def test_anybody_may_ask_with_head_what_is_open(keys: KeyRing) -> None:
    assert request(Inner(), keys, "nobody's key of all keys", "HEAD /health")[0] == 200


def test_a_tenant_may_not_do_what_admins_may(keys: KeyRing) -> None:
    assert request(Inner(), keys, TENANT, "POST /v1/adapters")[0] == 200
    assert request(Inner(), keys, TENANT, "POST /collective_rpc", [CALL])[0] == 403
    assert request(Inner(), keys, ADMIN, "POST /collective_rpc", [CALL])[0] == 200


@pytest.mark.parametrize("pieces", [[CALL], [CALL[:9], CALL[9:]]], ids=["whole", "pieces"])
def test_a_body_that_was_judged_is_read_once_more_and_then_the_caller_s_going(
    pieces: list[bytes], keys: KeyRing
) -> None:
    inner = Inner(reads=2)
    assert request(inner, keys, ADMIN, "POST /collective_rpc", pieces)[0] == 200
    assert inner.read == [
        {"type": "http.request", "body": CALL, "more_body": False},
        {"type": "http.disconnect"},
    ]
