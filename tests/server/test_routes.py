"""Every route of the running server, with every kind of key, against the table; the table against vLLM."""

from __future__ import annotations

import http.client
import importlib
import json
import pkgutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import httpx
import pytest
import torch
from fastapi import APIRouter
from server import ADMIN_KEY, Server, guarded, running
from starlette.routing import BaseRoute
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from safelora_vllm.errors import GuardError
from safelora_vllm.integration.server.access_check import RouteAccess
from safelora_vllm.integration.server.access_rules import REFUSED, TABLE, Access
from safelora_vllm.integration.worker.guard import WorkerGuard
from safelora_vllm.tenants.principal import Kind
from tests.server.conftest import INFERENCE_KEY, SPY, SPY_PATH, TENANT_KEYS, UNI, client, say, write_keys
from tests.server.fake_engine import root_logger_left_alone
from tests.server.route_spy import INVENTED, PASSED, described

METRICS_KEY = "a-metrics-key-of-this-test"
KEYS: dict[str, tuple[str, Kind]] = {
    "none": ("", "stranger"),
    "wrong": ("nobody-has-this-key", "stranger"),
    "inference": (INFERENCE_KEY, "inference"),
    "tenant": (TENANT_KEYS["acme"], "tenant"),
    "admin": (ADMIN_KEY, "admin"),
    "metrics": (METRICS_KEY, "metrics"),
}
ROOT = "/proxied"


@pytest.fixture(scope="module")
def dev_server(aligned: Path, projectors: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """In vLLM's development mode, behind a proxy's path, with everything closed that can be."""
    folder = tmp_path_factory.mktemp("dev")
    command = guarded(
        aligned, projectors, folder / "store", f"--api-key={INFERENCE_KEY}", f"--root-path={ROOT}",
        f"--keys={write_keys(folder / 'keys.toml')}", f"--metrics-key={METRICS_KEY}", "--private-docs",
        SPY, UNI,
    )  # fmt: skip
    with running(command, folder / "server.log", {**SPY_PATH, "VLLM_SERVER_DEV_MODE": "1"}) as started:
        yield started


def vllm_routes(monkeypatch: pytest.MonkeyPatch) -> Iterator[BaseRoute]:
    """All that this vLLM has for any model, task and option: of an application, and of all routers."""
    from vllm import entrypoints, tasks
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # 0.28
        from vllm.entrypoints.openai.api_server import build_app
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    options = ["--model=x", "--enable-tokenizer-info-endpoint", "--enable-offline-docs"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
    every_task = tuple(task for group in get_args(tasks.SupportedTask) for task in get_args(group) or [group])
    assert "generate" in every_task and "realtime" in every_task
    yield from build_app(args, every_task).routes
    for module in pkgutil.walk_packages(entrypoints.__path__, "vllm.entrypoints."):
        if module.name.rpartition(".")[2] == "api_router":
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, APIRouter):
                    yield from value.routes


def names(route: dict[str, Any]) -> list[str]:
    """What the table would call a route, for each of its methods."""
    if route["kind"] == "Mount":
        return [f"* {route['path']}/*"]
    methods = ["WEBSOCKET"] if "WebSocket" in route["kind"] else set(route["methods"]) - {"HEAD"}
    return [f"{method} {route['path']}" for method in sorted(methods)]


def test_no_route_of_vllm_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is forgotten is closed: safe, but its users would be refused."""
    with warnings.catch_warnings(), root_logger_left_alone():
        warnings.simplefilter("ignore")  # vLLM's
        found = {name for route in vllm_routes(monkeypatch) for name in names(described(route))}
    assert len(found) > 50
    assert found - set(TABLE) <= {
        "* /static/*",  # listed with --enable-offline-docs only
        # only with VLLM_ALLOW_RUNTIME_LORA_UPDATING, which the guard refuses
        "POST /adapters", "DELETE /adapters/{adapter_name}",
    }, found - set(TABLE)  # fmt: skip


def url(path: str) -> str:
    """An address that a template matches."""
    return path.replace("{name:path}", "acme/own").replace("{response_id}", "x").replace("*", "inner")


def passed(server: Server, name: str, key: str) -> int:
    """The status of a request for a route; `PASSED` if it came through to the application."""
    method, _, path = name.partition(" ")
    headers = {"x-spy": "1"} | ({"Authorization": f"Bearer {key}"} if key else {})
    if method == "WEBSOCKET":
        try:
            with connect(server.url.replace("http", "ws") + path, additional_headers=headers):
                return 101
        except InvalidStatus as refused:
            return refused.response.status_code
    method = "POST" if method == "*" else method
    return httpx.request(method, server.url + url(path), headers=headers, json={}).status_code


def expected(access: RouteAccess, name: str, kind: Kind) -> int:
    if kind not in access.may(TABLE.get(name, Access.ADMINS)):
        return 403 if kind == "tenant" else 401
    return 403 if name in REFUSED and name != "POST /sleep" else PASSED


def walk(server: Server, access: RouteAccess, kinds: list[str]) -> set[str]:
    """Compare every route of the running application with the table; gives their names."""
    with client(server, ADMIN_KEY) as admin:
        routes = admin.get("/spy/routes").json()
    every = {name for route in routes for name in names(route)}
    wrong = [
        (name, who, status)
        for name in sorted(every)
        for who in kinds
        if (status := passed(server, name, KEYS[who][0])) != expected(access, name, KEYS[who][1])
    ]
    assert not wrong, "\n".join(map(str, wrong))
    assert {name for route in INVENTED for name in names(described(route))} <= every - set(TABLE)
    return every


def test_every_route(server: Server) -> None:
    every = walk(server, RouteAccess(), ["none", "wrong", "inference", "tenant", "admin"])
    assert {"POST /v1/completions", "POST /tokenize", "* /metrics/*", "GET /openapi.json"} <= every


def test_every_route_in_development_mode(dev_server: Server) -> None:
    access = RouteAccess(private_metrics=True, private_docs=True)
    every = walk(dev_server, access, list(KEYS))
    assert {"POST /collective_rpc", "POST /update_weights", "GET /server_info"} <= every
    with client(dev_server, "") as nobody:
        assert nobody.get("/openapi.json").status_code == nobody.get("/metrics").status_code == 401
        assert nobody.get("/health").status_code == nobody.get("/version").status_code == 200


def test_changes_without_a_key_are_refused_for_real(dev_server: Server) -> None:
    """The same without the spy: the routes themselves."""
    for key in ("", "nobody-has-this-key", INFERENCE_KEY):
        with client(dev_server, key) as http:
            for path in ("/collective_rpc", "/sleep", "/pause", "/reset_prefix_cache", "/update_weights"):
                for prefix in ("", ROOT):
                    answer = http.post(prefix + path, json={"method": "list_loras"})
                    assert answer.status_code == 401, (key, prefix + path)
            assert http.get("/server_info").status_code == 401
    with client(dev_server, ADMIN_KEY) as admin:
        assert admin.get("/is_sleeping").json() == {"is_sleeping": False}
        assert say(admin, "aligned") and admin.get(f"{ROOT}/v1/models").status_code == 200


def test_what_an_admin_may_and_nobody_may(dev_server: Server) -> None:
    with client(dev_server, ADMIN_KEY) as admin:
        listed = admin.post("/collective_rpc", json={"method": "list_loras"})
        assert listed.status_code == 200 and "results" in listed.json()
        assert admin.post("/reset_prefix_cache").status_code == 200
        for path, body in (
            ("/collective_rpc", {"method": "add_lora", "args": ["x"]}),
            ("/collective_rpc", {"method": "load_model"}),
            ("/update_weights", {"update_info": {}}),
            ("/init_weight_transfer_engine", {"init_info": {}}),
            ("/sleep?level=2", {}),
        ):
            answer = admin.post(path, json=body)
            assert answer.status_code == 403 and "while adapters are guarded" in answer.text, path
        assert say(admin, "aligned"), "the engine goes on"


def test_odd_request_lines_and_hosts(dev_server: Server) -> None:
    """What a client library would not send."""
    host, port = dev_server.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "aligned", "prompt": "x", "max_tokens": 1})
    path = "/v1/completions"
    for target in (path, dev_server.url + path, "/" + path, "/v1/.." + path, "/health/.." + path):
        for named in (f"{host}:{port}", "x/health?", "x/health#", "/health", ""):
            connection = http.client.HTTPConnection(host, int(port), timeout=60)
            connection.putrequest("POST", target, skip_host=True)
            connection.putheader("Host", named)
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body.encode())
            status = connection.getresponse().status
            connection.close()
            assert status in (400, 401), (target, named, status)


def test_what_workers_refuse_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    config: Any = SimpleNamespace(weight_transfer_config=object())
    monkeypatch.setenv("VLLM_PLUGINS", "other,safelora")
    with pytest.raises(GuardError, match="weight transfer"):
        WorkerGuard(config, torch.device("cpu"))
    for plugins in ("", "safelora2", "other"):  # without the middleware nobody checks keys
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
        with pytest.raises(GuardError, match="VLLM_PLUGINS does not name safelora"):
            WorkerGuard(config, torch.device("cpu"))
    monkeypatch.delenv("VLLM_PLUGINS")
    with pytest.raises(GuardError, match="VLLM_PLUGINS does not name safelora"):
        WorkerGuard(config, torch.device("cpu"))
