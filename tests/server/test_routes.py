"""Every route of the running server, with every kind of key, against the table; the table against vLLM."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, get_args

import httpx
import pytest
import torch
from fastapi import APIRouter
from server import ADMIN_KEY, Server
from starlette.routing import BaseRoute
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from safelora_vllm.errors import GuardError
from safelora_vllm.integration.server.access_check import RouteAccess
from safelora_vllm.integration.server.access_rules import REFUSED, TABLE, Access
from safelora_vllm.integration.worker.guard import WorkerGuard
from safelora_vllm.tenants.principal import Kind
from tests.server.conftest import INFERENCE_KEY, TENANT_KEYS, client
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
        routes = admin.get("/health", headers={"x-spy": "routes"}).json()
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
