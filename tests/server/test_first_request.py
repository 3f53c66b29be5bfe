"""Requests for adapters that are not ready wait for them, under their caller's key. Fake engine."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safelora_vllm.errors import GateUnavailable, StoreUnavailable
from safelora_vllm.integration.server import first_request, middleware
from safelora_vllm.tenants.principal import Principal
from tests.server.conftest import ADMIN_KEY, INFERENCE_KEY, TENANT_KEYS, upload
from tests.server.fake_server import FakeServer

NAME = "acme/x"


def withdraw(fake: FakeServer) -> None:
    names = fake.app.state.safelora.served

    def put() -> None:
        names.put(dataclasses.replace(names.registry[NAME], served=None, problem=StoreUnavailable("lost")))

    fake.portal.call(put)


def served(fake: FakeServer) -> bool:
    return fake.app.state.safelora.registry[NAME].served is not None


def ask(fake: FakeServer, key: str, **more: Any) -> int:
    body = {"model": NAME, "prompt": "x", **more}
    return fake.client(key).post("/v1/completions", json=body).status_code


@pytest.fixture
def unready(fake: FakeServer, drafts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """With an adapter of acme's that is not served now, and which no heartbeat brings back."""
    monkeypatch.setattr(fake.app.state.safelora, "_prepare_again", lambda: None)
    assert upload(fake.client(ADMIN_KEY), NAME, drafts["qv"]).status_code == 201
    withdraw(fake)
    return fake


def test_its_first_request_waits_and_is_admitted(unready: FakeServer) -> None:
    ask(unready, TENANT_KEYS["acme"])
    assert served(unready) and not unready.app.state.safelora.served.unready
    withdraw(unready)
    ask(unready, ADMIN_KEY)
    assert served(unready)


@pytest.mark.parametrize("key", ["", "wrong", INFERENCE_KEY, TENANT_KEYS["globex"]])
def test_nobody_wakes_what_they_may_not_use(unready: FakeServer, key: str) -> None:
    ask(unready, key)
    assert not served(unready)


def test_other_requests_do_not_wake_it(unready: FakeServer) -> None:
    acme = unready.client(TENANT_KEYS["acme"])
    for body in ({"model": "aligned", "prompt": "x"}, {"prompt": "x"}, [NAME], {"model": [NAME]}):
        acme.post("/v1/completions", json=body)
    acme.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    big = {"model": NAME, "prompt": "x" * first_request._MAX_BODY}
    acme.post("/v1/completions", json=big)
    assert not served(unready)


def test_the_wait_is_bounded(unready: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_request, "_PATIENCE_SECONDS", 0.3)
    reconciler = unready.app.state.safelora
    asked = []

    async def never(name: str, **_: object) -> None:
        asked.append(name)

    monkeypatch.setattr(reconciler, "_prepare", never)
    began = time.monotonic()
    ask(unready, TENANT_KEYS["acme"])
    assert time.monotonic() - began >= 0.3 and asked
    answer = unready.client(TENANT_KEYS["acme"]).get(f"/v1/adapters/{NAME}")
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "2"


def test_what_failed_just_now_is_not_waited_for(unready: FakeServer) -> None:
    retries = unready.app.state.safelora._retries
    for _ in range(2):
        retries.failed(NAME, str(GateUnavailable("down")))
    began = time.monotonic()
    ask(unready, TENANT_KEYS["acme"])
    assert not served(unready)
    assert time.monotonic() - began < first_request._PATIENCE_SECONDS / 2


def test_a_body_that_comes_slowly_is_left_to_its_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_request, "_READ_SECONDS", 0.1)
    messages = [
        {"type": "http.request", "body": b'{"model"', "more_body": True},
        {"type": "http.request", "body": b': "x"}', "more_body": False},
    ]
    left = list(messages)

    async def receive() -> Any:
        if len(left) == 1:
            await asyncio.sleep(0.3)
        return left.pop(0)

    async def use() -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", b"14")]
        scope = {"type": "http", "method": "POST", "headers": headers}
        names = SimpleNamespace(unready={"x"})
        who = Principal("admin", "admin/ops")
        again = await first_request.wait_until_ready(SimpleNamespace(served=names), who, scope, receive)  # type: ignore[arg-type]
        assert [await again(), await again()] == messages, "all of it, in its order"

    asyncio.run(use())


@pytest.mark.parametrize(
    ("key", "path"),
    [
        (TENANT_KEYS["acme"], "/v1/adapters"),
        (ADMIN_KEY, "/v1/load_lora_adapter"),
        ("", "/ping"),
        ("wrong", "/ping"),
    ],
)
def test_bodies_of_other_requests_are_not_read(
    unready: FakeServer, monkeypatch: pytest.MonkeyPatch, key: str, path: str
) -> None:
    """A stranger would have each of them kept in memory for as long as it pleases."""

    async def read(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(middleware, "wait_until_ready", read)
    body = {"model": NAME, "lora_name": NAME, "lora_path": "/none"}
    answer = unready.client(key).post(path, json=body)
    assert answer.status_code in (200, 403) and not served(unready)
