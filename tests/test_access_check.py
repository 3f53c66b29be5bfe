"""Who may call which route, and that nothing but the routes' own names decides."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Host, Match, Mount, Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from safelora_vllm.errors import Forbidden, GuardError, Unauthorized, UnknownRoute, UsageError
from safelora_vllm.integration.server.access_check import RouteAccess, check_routes, granted
from safelora_vllm.integration.server.access_rules import REFUSED, RPC_METHODS, TABLE, Access
from safelora_vllm.integration.server.callers import caller
from safelora_vllm.integration.server.middleware import AccessMiddleware, Door
from safelora_vllm.tenants.keys import KeyRing
from safelora_vllm.tenants.principal import Kind, Principal

KINDS: tuple[Kind, ...] = ("admin", "tenant", "inference", "metrics", "anonymous", "stranger")
# Written down once more, as what has to hold, whatever the table says.
OPEN = (
    "GET /health, GET /ping, POST /ping, GET /version, GET /safelora/, GET /safelora/ready, "
    "GET /safelora/page/{file}"
)
DOCUMENTS = "GET /openapi.json, GET /docs, GET /docs/oauth2-redirect, GET /redoc"
TENANTS = (
    "POST /v1/adapters, DELETE /v1/adapters/{name:path}, DELETE /v1/adapters/{name:path}/versions/{number}, "
    "POST /v1/adapters/{name:path}/rollback, GET /v1/usage, GET /v1/audit"
)
CHANGES_WEIGHTS = (
    "POST /collective_rpc", "POST /init_weight_transfer_engine", "POST /shutdown_weight_transfer_engine",
    "POST /start_weight_update", "POST /start_draft_weight_update", "POST /update_weights",
    "POST /finish_weight_update", "POST /sleep", "POST /weight_checker",
)  # fmt: skip
# SageMaker's; vLLM has them only where it is told so, and no caller is given them.
LOADS_ELSEWHERE = ("POST /adapters", "DELETE /adapters/{adapter_name}")
ADMIN, TENANT, INFERENCE, METRICS = (
    f"the {who} key of this test" for who in ("admin", "acme", "api", "prom")
)
KEYS = {"admin": ADMIN, "inference": INFERENCE, "metrics": METRICS, "stranger": "nobody's key of all keys"}


def may(access: Access, **options: bool) -> list[Kind]:
    return [kind for kind in KINDS if kind in RouteAccess(**options).may(access)]


def test_who_has_which_access() -> None:
    users: list[Kind] = ["admin", "tenant", "inference", "anonymous"]
    keys: list[Kind] = ["admin", "tenant", "inference", "metrics"]
    assert may(Access.ANYBODY) == may(Access.DOCS) == may(Access.METRICS) == list(KINDS)
    assert may(Access.USERS) == users
    assert may(Access.TENANTS) == ["admin", "tenant"]
    assert may(Access.MONITORS) == may(Access.METRICS, private_metrics=True) == ["admin", "metrics"]
    assert may(Access.ADMINS) == ["admin"]
    assert may(Access.DOCS, private_docs=True) == keys
    assert may(Access.ANYBODY, private_docs=True, private_metrics=True) == list(KINDS)
    assert may(Access.METRICS, private_docs=True) == may(Access.DOCS, private_metrics=True) == list(KINDS)


def test_what_is_open_and_what_tenants_may_change() -> None:
    def listed(access: Access) -> set[str]:
        return {name for name, given in TABLE.items() if given is access}

    assert listed(Access.ANYBODY) == set(OPEN.split(", "))
    assert listed(Access.DOCS) == set(DOCUMENTS.split(", "))
    assert listed(Access.METRICS) == {"GET /metrics", "* /metrics/*"}
    assert listed(Access.TENANTS) == set(TENANTS.split(", "))
    assert listed(Access.MONITORS) == {"GET /load"}
    assert {TABLE[name] for name in CHANGES_WEIGHTS} == {Access.ADMINS}
    assert set(REFUSED) == {*CHANGES_WEIGHTS, *LOADS_ELSEWHERE}


def test_entries_have_the_form_of_names() -> None:
    for name in TABLE:
        assert re.fullmatch(r"(GET|POST|PUT|DELETE|WEBSOCKET) /[\w./{}:-]*|\* /\w+/\*", name), name
    # What a user's route reads is filtered by the serving map; what it changes has to have an owner.
    changing = {name for name, given in TABLE.items() if given is Access.USERS and "adapter" in name}
    assert {name.split()[0] for name in changing} == {"GET"}


def application(*more: BaseRoute, **options: bool) -> Starlette:
    """Routes that say which they are and who called, behind the middleware."""

    async def say(request: Request) -> JSONResponse:
        body = (await request.body()).decode()
        who = caller()
        token = request.headers.get("authorization")
        return JSONResponse(
            {"route": request.scope["route"].path, "who": who and who.kind, "token": token, "body": body}
        )

    async def listen(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("here")
        await socket.close()

    async def sub(scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({"route": "mounted"})(scope, receive, send)

    routes: list[BaseRoute] = [*more]
    for name in TABLE:
        method, _, path = name.partition(" ")
        if method == "WEBSOCKET":
            routes.append(WebSocketRoute(path, listen))
        elif method == "*":
            routes.append(Mount(path.removesuffix("/*"), sub))
        else:
            routes.append(Route(path, say, methods=[method]))
    app = Starlette(
        routes=sorted(routes, key=lambda route: isinstance(route, Mount)),
        middleware=[
            Middleware(AccessMiddleware),
            Middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"]),
        ],
    )
    keys = KeyRing.open(None, ADMIN, [INFERENCE], METRICS)
    app.state.safelora_door = Door(keys, "the inner key", RouteAccess(**options))
    return app


@pytest.fixture(scope="module")
def http() -> Iterator[TestClient]:
    with TestClient(
        application(Route("/invented", lambda _: JSONResponse({})), private_metrics=True)
    ) as made:
        yield made


def call(http: TestClient, who: str, method: str, path: str, **more: Any) -> Any:
    headers = {"Authorization": f"Bearer {KEYS[who]}"} if who in KEYS else {}
    return http.request(method, path, headers={**headers, **more.pop("headers", {})}, **more)


@pytest.mark.parametrize("name", [name for name in TABLE if not name.startswith("WEBSOCKET")])
def test_every_entry_is_held(http: TestClient, name: str) -> None:
    method, _, path = name.replace("{name:path}", "acme/a").replace("{response_id}", "x").partition(" ")
    method, path = method.replace("*", "POST"), path.replace("*", "deeper")
    body = {"method": "check_health", "action": "checksum", "args": [], "timeout": None}
    access = RouteAccess(private_metrics=True)
    for who in ("admin", "inference", "metrics", "stranger", "nobody"):
        kind: Any = "stranger" if who == "nobody" else who
        answer = call(http, who, method, path, json=body)
        if kind not in access.may(TABLE[name]):
            assert answer.status_code == 401, who
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "AuthenticationError"
        elif REFUSED.get(name) and not REFUSED[name].reads_body and name != "POST /sleep":
            assert answer.status_code == 403 and "while adapters are guarded" in answer.text, who
        else:
            assert answer.status_code == 200, (who, answer.text)


def test_a_key_that_is_unknown_is_told_from_none(http: TestClient) -> None:
    unknown = "'Authorization: Bearer KEY'. The one that was sent is unknown here, or no longer in force"
    for who in ("stranger", "nobody", "inference"):
        message = call(http, who, "GET", "/invented").json()["error"]["message"]
        assert "needs an admin key" in message and message.endswith(unknown) == (who == "stranger"), who


@pytest.mark.parametrize("sent", ["Basic bm9ib2R5OnB3", KEYS["stranger"], "Bearer", ""])
def test_what_is_no_bearers_key_is_none(http: TestClient, sent: str) -> None:
    message = http.get("/invented", headers={"Authorization": sent}).json()["error"]["message"]
    assert "needs an admin key" in message and "unknown here" not in message


def test_without_inference_keys_an_unknown_key_is_told_too() -> None:
    app = application(Route("/invented", lambda _: JSONResponse({})))
    app.state.safelora_door = dataclasses.replace(app.state.safelora_door, keys=KeyRing.open(None, ADMIN, []))
    with TestClient(app) as http:
        for who in ("stranger", "nobody"):
            message = call(http, who, "GET", "/invented").json()["error"]["message"]
            assert "needs an admin key" in message and ("unknown here" in message) == (who == "stranger")


@pytest.mark.parametrize(
    ("kind", "path", "expected"),
    [
        ("inference", "/v1/models", True),
        ("admin", "/v1/models", True),
        ("metrics", "/v1/models", False),
        ("inference", "/metrics", False),
        ("admin", "/v1/audit", False),
        ("inference", "/nowhere", False),
    ],
)
def test_who_uses_models(kind: Any, path: str, expected: bool) -> None:
    routes = application().router.routes
    scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    access = RouteAccess(private_metrics=True)
    assert access.uses_models(Principal(kind, kind), routes, scope) is expected


def test_who_calls_is_known_inside_and_only_our_callers_get_the_inner_key(http: TestClient) -> None:
    admin, inference = (call(http, who, "GET", "/v1/models").json() for who in ("admin", "inference"))
    assert (admin["who"], admin["token"]) == ("admin", "Bearer the inner key")
    assert (inference["who"], inference["token"]) == ("inference", f"Bearer {INFERENCE}")


def test_what_is_not_listed_needs_an_admin(http: TestClient) -> None:
    for method, path in (("GET", "/invented"), ("HEAD", "/invented")):
        assert [call(http, who, method, path).status_code for who in ("admin", "inference", "none")] == [
            200, 401, 401,
        ]  # fmt: skip


ODD = [
    ("GET", "/v1/models/"), ("GET", "//v1/models"), ("GET", "/v1//models"), ("GET", "/v1/models//"),
    ("GET", "/health/../v1/models"), ("GET", "/health/..%2fv1/models"), ("GET", "/v1%2fmodels"),
    ("GET", "/%76%31/models"), ("GET", "/V1/models"), ("GET", "/v1/models;x"), ("GET", "/v1/models%00"),
    ("HEAD", "/v1/models"), ("POST", "/v1/models"), ("TRACE", "/v1/models"), ("get", "/v1/models"),
    ("POST", "/collective_rpc/"), ("POST", "//collective_rpc"), ("POST", "/collective%5frpc"),
    ("POST", "/health/%2e%2e/sleep"), ("PUT", "/health"), ("DELETE", "/ping"), ("POST", "/metrics/../sleep"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ODD)
@pytest.mark.parametrize("root", ["", "/proxied"])
def test_no_spelling_of_a_path_opens_anything(http: TestClient, method: str, path: str, root: str) -> None:
    """Whatever a spelling reaches, without a key it is what is open anyway, or nothing."""
    with TestClient(http.app, root_path=root) as client:
        for prefix in {"", root}:
            answer = client.request(method, prefix + path, follow_redirects=True)
            assert answer.status_code == 401, answer.text


@given(
    st.lists(
        st.sampled_from(
            [
                "/",
                "//",
                "v1",
                "models",
                "health",
                "metrics",
                "invented",
                "sleep",
                ".",
                "..",
                "%2f",
                "%2e%2e",
                ";",
            ]
        ),
        max_size=6,
    ).map("".join),
    st.sampled_from(["GET", "POST", "HEAD", "PUT", "get", "DELETE"]),
    st.sampled_from(["", "/v1", "/root"]),
)
def test_what_runs_without_a_key_is_open(path: str, method: str, root: str) -> None:
    """The independent statement: run the same request past the middleware and see which route it reaches."""
    routes = application().router.routes
    scope = {"type": "http", "method": method, "path": f"/{path}", "root_path": root, "headers": []}
    reached = [route for route in routes if route.matches(scope)[0] is Match.FULL][:1]
    try:
        RouteAccess().check(Principal("stranger", "stranger"), routes, scope)
    except Unauthorized:
        return
    for route in reached:
        assert route.path in ("/health", "/ping", "/version", "/metrics"), (path, method)


def test_callers_who_may_use_models_are_told_that_nothing_is_there(http: TestClient) -> None:
    answer = call(http, "inference", "GET", "/v1/none")
    assert answer.status_code == 404 and "there is no GET '/v1/none'" in answer.json()["error"]["message"]
    answer = call(http, "admin", "GET", "/v1/none")
    assert answer.status_code == 404 and answer.json()["error"]["type"] == "NotFoundError"
    assert call(http, "inference", "GET", "/v1/models/").json()["route"] == "/v1/models"  # redirected


def test_a_method_that_a_path_does_not_have(http: TestClient) -> None:
    """Named are those that the caller may use; where there are none, nothing is there."""
    for who in ("admin", "inference"):
        answer = call(http, who, "PUT", "/v1/models")
        assert answer.status_code == 405 and answer.headers["Allow"] == "GET, HEAD"
        assert answer.json()["error"] == {
            "message": "PUT is not a valid method of '/v1/models': expected GET, HEAD",
            "type": "MethodNotAllowedError", "param": None, "code": 405,
        }  # fmt: skip
    ours = {who: call(http, who, "PATCH", "/v1/adapters/acme/a") for who in ("admin", "inference")}
    assert [ours[who].headers["Allow"] for who in ("admin", "inference")] == [
        "DELETE, GET, HEAD",
        "GET, HEAD",
    ]
    assert call(http, "admin", "DELETE", "/pause").headers["Allow"] == "POST"
    assert call(http, "inference", "DELETE", "/pause").status_code == 404
    assert call(http, "stranger", "DELETE", "/v1/models").status_code == 401
    long = call(http, "admin", "PATCH", f"/v1/adapters/{'x' * 500}")
    assert long.status_code == 405 and len(long.json()["error"]["message"]) < 300
    twice = Route("/ping", lambda _: JSONResponse({}), methods=["GET", "POST"])
    with TestClient(application(twice)) as client:
        assert (
            client.put("/ping", headers={"Authorization": f"Bearer {ADMIN}"}).headers["Allow"]
            == "GET, HEAD, POST"
        )


def test_a_browser_s_preflight_needs_no_key(http: TestClient) -> None:
    asked = {"Origin": "http://a", "Access-Control-Request-Method": "POST"}
    assert http.options("/v1/completions", headers=asked).status_code == 200
    assert http.options("/v1/completions").status_code == 405
    assert http.options("/metrics/x", headers=asked).status_code == 401  # a mount would run for any method


def test_websockets(http: TestClient) -> None:
    with http.websocket_connect("/v1/realtime", headers={"Authorization": f"Bearer {INFERENCE}"}) as socket:
        assert socket.receive_text() == "here"
    for path in ("/v1/realtime", "/v1/realtime/", "/v1/models", "/health"):
        with pytest.raises(WebSocketDisconnect), http.websocket_connect(path):
            pass


@pytest.mark.parametrize(
    "route",
    [
        Mount("/v1", routes=[Route("/models2", lambda _: JSONResponse({}))]),
        Host("inside", app=Starlette(routes=[Route("/health", lambda _: JSONResponse({}))])),
    ],
    ids=["mount", "host"],
)
def test_a_sub_application_that_is_not_listed_is_closed(route: BaseRoute) -> None:
    with TestClient(application(route)) as http:
        headers = {"Host": "inside"}
        path = "/v1/models2" if isinstance(route, Mount) else "/health"
        for who in ("stranger", "inference", "none"):
            assert call(http, who, "GET", path, headers=headers).status_code == 401
        assert call(http, "admin", "GET", path, headers=headers).status_code == 200


def test_a_host_header_with_a_path_opens_nothing(http: TestClient) -> None:
    """Where the path is taken from a URL that is put together with this header, it would be /health."""
    for host in ("x/health?", "x/health#", "/health", "x:80/health?"):
        assert http.get("/v1/models", headers={"Host": host}).status_code == 401


@pytest.mark.parametrize(
    ("query", "harmless"),
    [
        ("", True), ("level=1", True), ("level=0", True), ("level=1&mode=wait", True), ("level=2", False),
        ("level=1&level=2", False), ("level=2&level=1", False), ("level=%32", False), ("level=02", False),
        ("level=2.0", False), ("level=+2", False), ("level=%D9%A2", False), ("level=", False),
    ],
)  # fmt: skip
def test_sleep_keeps_the_weights(http: TestClient, query: str, harmless: bool) -> None:
    assert call(http, "admin", "POST", f"/sleep?{query}").status_code == (200 if harmless else 403)
    assert call(http, "inference", "POST", f"/sleep?{query}").status_code == 401


@pytest.mark.parametrize("method", RPC_METHODS)
def test_harmless_worker_methods_pass_with_their_body(http: TestClient, method: str) -> None:
    text = json.dumps({"method": method})
    answer = call(http, "admin", "POST", "/collective_rpc", content=text)
    assert answer.status_code == 200 and answer.json()["body"] == text


@pytest.mark.parametrize(
    "body",
    [
        {"method": "add_lora"}, {"method": "remove_lora"}, {"method": "load_model"},
        {"method": "update_weights"}, {"method": "reload_weights"}, {"method": "sleep"},
        {"method": "execute_method", "args": ["add_lora"]}, {"method": "_load_adapter"},
        {"method": "safelora_load"}, {"method": ["check_health"]}, {"method": {}}, {"method": None},
        {"method": " check_health"}, {}, [], "check_health", 0, {"method": "check_health", "timeout": 0},
        {"method": "check_health", "args": [1]}, {"method": "check_health", "kwargs": {"a": 1}},
        {"method": "profile"},
    ],
    ids=str,
)  # fmt: skip
def test_other_worker_methods_are_refused(http: TestClient, body: Any) -> None:
    answer = call(http, "admin", "POST", "/collective_rpc", json=body)
    assert answer.status_code == 403
    assert "without the gate" in answer.text and "check_health" in answer.text


def test_the_last_of_two_methods_counts_as_for_vllm(http: TestClient) -> None:
    twice = '{"method": "check_health", "method": "add_lora"}'
    assert call(http, "admin", "POST", "/collective_rpc", content=twice).status_code == 403


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "is not JSON"), ("[" * 50_000, "is not JSON"), (" " * 70_000 + "{}", "at most 65,536 bytes")],
    ids=["cut", "deep", "long"],
)
def test_bodies_that_cannot_be_judged(http: TestClient, content: str, words: str) -> None:
    answer = call(http, "admin", "POST", "/collective_rpc", content=content)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    assert call(http, "stranger", "POST", "/collective_rpc", content=content).status_code == 401


def test_a_body_that_is_judged_has_64_kib_and_not_one_byte_more(http: TestClient) -> None:
    text = json.dumps({"method": "check_health"}).ljust(64 * 1024)
    assert call(http, "admin", "POST", "/collective_rpc", content=text).json()["body"] == text
    assert call(http, "admin", "POST", "/collective_rpc", content=f"{text} ").status_code == 400


@pytest.mark.parametrize(
    ("action", "status"), [("checksum", 200), ("compare", 200), ("reset", 403), (1, 403)]
)
def test_weights_are_compared_but_not_reset(http: TestClient, action: object, status: int) -> None:
    assert call(http, "admin", "POST", "/weight_checker", json={"action": action}).status_code == status


def test_without_a_guard_admins_may_do_what_vllm_lets_them() -> None:
    with TestClient(application(guarding=False)) as http:
        assert call(http, "admin", "POST", "/update_weights", json={}).status_code == 200
        assert call(http, "inference", "POST", "/update_weights", json={}).status_code == 401


def test_an_operator_lists_routes_of_their_own() -> None:
    more = granted({"GET /invented": "users", "* /mine/*": "anybody", "POST /mine": "tenants"})
    access = RouteAccess(more=more)
    assert [access.access(name) for name in ("GET /invented", "* /mine/*", "POST /mine")] == [
        Access.USERS, Access.ANYBODY, Access.TENANTS,
    ]  # fmt: skip
    assert access.access("POST /invented") is Access.ADMINS
    assert access.access("GET /health") is Access.ANYBODY


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("/invented", "users", "not a valid route"), ("GET invented", "users", "not a valid route"),
        ("ANY /invented", "users", "not a valid route"), ("* /mine", "users", "not a valid route"),
        ("GET /a b", "users", "not a valid route"), ("GET /invented", "admins", "not who may call"),
        ("GET /invented", "", "not who may call"), ("POST /sleep", "users", "its access already: admin"),
    ],
)  # fmt: skip
def test_what_an_operator_cannot_list(name: str, word: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        granted({name: word})


def test_tenants_are_forbidden_what_others_need_a_key_for() -> None:
    routes = application().router.routes
    scope = {"type": "http", "method": "POST", "path": "/pause", "headers": []}
    with pytest.raises(Forbidden, match="needs an admin key"):
        RouteAccess().check(Principal("tenant", "acme/ci", "acme"), routes, scope)
    with pytest.raises(Unauthorized, match="needs an admin key"):
        RouteAccess().check(Principal("inference", "inference"), routes, scope)
    with pytest.raises(UnknownRoute):
        RouteAccess().check(Principal("anonymous", "anonymous"), routes, {**scope, "path": "/none"})


def test_a_web_framework_that_hides_its_routes_is_noticed() -> None:
    @dataclasses.dataclass
    class Hidden(BaseRoute):
        """As FastAPI keeps an included router from 0.137 on: a route without a path."""

        inner: Sequence[BaseRoute]

        def matches(self, scope: Scope) -> tuple[Match, Scope]:
            return max((route.matches(scope) for route in self.inner), key=lambda found: found[0].value)

    routes = application().router.routes
    check_routes(routes)
    with pytest.raises(GuardError, match="Hidden"):
        check_routes([Hidden(routes)])
    with pytest.raises(GuardError, match="None"):
        check_routes([])
