"""What the endpoint plugin makes of vLLM's options and of its own settings, and what stops a start."""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from safelora_vllm.errors import GuardError, UsageError
from safelora_vllm.gate.socket_folder import remove_unowned
from safelora_vllm.integration.server import app as endpoint
from safelora_vllm.integration.server.access_rules import Access
from safelora_vllm.integration.server.app import SafeLoRAEndpoint
from safelora_vllm.integration.server.changes import Manager
from safelora_vllm.integration.server.middleware import AccessMiddleware
from safelora_vllm.policy import Policy
from safelora_vllm.settings import ADMIN_KEY, METRICS_KEY, ServerSettings
from safelora_vllm.store.layout import AUDIT
from tests.server.fake_engine import MODEL, FakeEngine
from tests.server.fake_server import Place

SETTINGS = ServerSettings("/cache", "/store")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (METRICS_KEY, "VLLM_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(ADMIN_KEY, "an admin key of this test")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY_MADE", "")  # undone at the end, whatever sets it


def args(settings: ServerSettings | None = SETTINGS, **options: Any) -> Namespace:
    given = {"api_key": None, "middleware": [], "enable_lora": True, **options}
    return Namespace(additional_config=settings and settings.to_section(), **given)


def attached(given: Namespace) -> tuple[FastAPI, SafeLoRAEndpoint]:
    app, plugin = FastAPI(), SafeLoRAEndpoint()
    app.state.args = given
    plugin.attach_router(app)
    return app, plugin


def test_callers_of_ours_get_a_key_that_vllm_knows_and_nobody_can_guess() -> None:
    options = args(api_key=["one", "two"])
    first, _ = attached(options)
    inner = first.state.safelora_door.inner_key
    assert options.api_key == ["one", "two", inner] and len(inner) >= 43, "32 random bytes"
    second, _ = attached(args(api_key=["one"]))
    assert second.state.safelora_door.inner_key != inner
    assert options.middleware == [f"{AccessMiddleware.__module__}.AccessMiddleware"]


def test_the_inference_key_may_come_from_vllms_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "a key of vLLM's")
    options = args()
    app, _ = attached(options)
    assert options.api_key == ["a key of vLLM's", app.state.safelora_door.inner_key]
    assert app.state.safelora_door.keys.identify("a key of vLLM's").kind == "inference"
    attached(options := args(api_key=["another"]))
    assert options.api_key[0] == "another"


@pytest.mark.parametrize(
    ("keys", "open_to_all"), [(False, "all adapters"), (True, "adapters without a tenant")]
)
def test_a_server_that_is_open_says_so(
    keys: bool, open_to_all: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(endpoint, "tenant_check", lambda *_: None)  # it reads the projector cache
    file = tmp_path / "keys.toml"
    file.touch(0o600)
    file.write_text('[tenants.acme.keys]\nci = "a long secret of acme"\n')
    settings = ServerSettings("/cache", "/store", keys=str(file) if keys else None)
    options = args(settings)
    app, _ = attached(options)
    assert options.api_key is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"may use the base model and {open_to_all}. Changes need" in record.getMessage()
    known = app.state.safelora_door.keys.identify("a long secret of acme")
    assert known.kind == ("tenant" if keys else "anonymous")
    caplog.clear()
    attached(args(settings, api_key=["one"]))
    assert not caplog.records


def test_settings_reach_the_check_of_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    app, _ = attached(args())
    access = app.state.safelora_door.access
    assert (access.guarding, access.private_metrics, access.private_docs, access.more) == (
        True, False, False, {},
    )  # fmt: skip
    assert app.state.safelora_upload_limiter._free == 8
    monkeypatch.setenv(METRICS_KEY, "a key of Prometheus")
    private = ServerSettings(
        "/cache", "/store", private_docs=True, concurrent_uploads=3, route_access={"GET /x": "users"}
    )
    app, _ = attached(args(private, enable_offline_docs=True))
    access = app.state.safelora_door.access
    assert (access.guarding, access.private_metrics, access.private_docs) == (True, True, True)
    assert access.more == {"GET /x": Access.USERS, "* /static/*": Access.DOCS}
    assert app.state.safelora_upload_limiter._free == 3
    with pytest.raises(UsageError, match="has its access already"):
        attached(args(ServerSettings("/cache", "/store", route_access={"GET /load": "users"})))


@pytest.mark.parametrize("given", [None, SETTINGS])
def test_a_server_without_lora_has_keys_and_no_guard(given: ServerSettings | None) -> None:
    app, _ = attached(args(given, enable_lora=False))
    assert app.state.safelora_door.access.guarding is False
    private = ServerSettings("/cache", "/store", private_docs=True)
    app, _ = attached(args(private, enable_lora=False))
    assert app.state.safelora_door.access.private_docs


def test_a_server_with_lora_and_without_a_section_does_not_start() -> None:
    with pytest.raises(GuardError, match="has no projector cache"):
        attached(args(None))


def test_where_the_admin_key_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(endpoint, "tenant_check", lambda *_: None)  # it reads the projector cache

    def admin(key: str, **options: Any) -> bool:
        app, _ = attached(args(**options))
        return bool(app.state.safelora_door.keys.identify(key).kind == "admin")

    assert admin("an admin key of this test", api_server_count=2)
    for empty in ("", None):
        monkeypatch.setenv(ADMIN_KEY, "")
        if empty is None:
            monkeypatch.delenv(ADMIN_KEY)
        for count in (None, 0, 1):
            assert not admin("", api_server_count=count)
            assert "admin key for this run" in capsys.readouterr().out
        with pytest.raises(GuardError, match=f"several API servers need one admin key: set {ADMIN_KEY}"):
            attached(args(api_server_count=2))
        file = tmp_path / "keys.toml"
        file.touch(0o600)
        file.write_text('[admin]\nops = "a long secret of ops"\n')
        with_keys = ServerSettings("/cache", "/store", keys=str(file))
        assert admin("a long secret of ops", settings=with_keys, api_server_count=2)
        assert "admin key" not in capsys.readouterr().out


def test_errors_of_the_application_are_answered_in_our_form() -> None:
    app, _ = attached(args())

    @app.get("/fails")
    async def fails() -> None:
        raise UsageError("not so")

    answer = TestClient(app).get("/fails")
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "not so")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda app: app.user_middleware.clear(), "callers cannot be told apart"),
        (lambda app: app.router.routes.clear(), "routes cannot be told apart"),
    ],
    ids=["middleware", "routes"],
)
@pytest.mark.parametrize("lora", [True, False])
def test_a_server_whose_callers_cannot_be_told_apart_does_not_start(
    lora: bool, damage: Callable[[FastAPI], None], match: str
) -> None:
    app, plugin = attached(options := args(enable_lora=lora))
    app.add_middleware(AccessMiddleware)
    damage(app)
    with pytest.raises(GuardError, match=match):
        asyncio.run(plugin.init_state(None, app.state, options))


@pytest.mark.parametrize("engine", [None, FakeEngine()], ids=["none", "without LoRA"])
def test_a_server_without_an_engine_or_lora_manages_nothing(engine: FakeEngine | None) -> None:
    app, plugin = attached(options := args(enable_lora=engine is None))
    app.add_middleware(AccessMiddleware)
    asyncio.run(plugin.init_state(engine, app.state, options))
    assert not hasattr(app.state, "safelora") and not hasattr(app.state, "safelora_manager")
    answer = TestClient(app, headers={"Authorization": f"Bearer {os.environ[ADMIN_KEY]}"}).get("/v1/adapters")
    assert answer.status_code == 503 and "--enable-lora" in answer.json()["error"]["message"]


@pytest.mark.parametrize("mode", ["enforce", "report-only"])
def test_a_start(
    mode: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    registered: list[Any] = []
    monkeypatch.setattr(endpoint.atexit, "register", lambda *given: registered.append(given))
    if mode == "report-only":
        lax = msgspec.structs.replace(place.service.state(), policy=Policy(mode="report-only"))
        monkeypatch.setattr(place.service, "state", lambda: lax)
    settings = ServerSettings(
        str(place.gate.settings.projectors), str(place.store), adapter_roots=[str(tmp_path / "link")],
        max_adapter_bytes=12345, allow_hub=True,
    )  # fmt: skip
    app, plugin = attached(options := args(settings))
    app.add_middleware(AccessMiddleware)
    app.state.openai_serving_models = SimpleNamespace(lora_requests={}, is_base_model=MODEL.__eq__)

    async def begin() -> Manager:
        await plugin.init_state(place.engine(), app.state, options)
        await app.state.safelora.stop()
        return app.state.safelora_manager  # type: ignore[no-any-return]

    with caplog.at_level(logging.INFO):
        manager = asyncio.run(begin())
    assert manager.roots == (root.resolve(),), "a link may be exchanged later"
    assert (manager.max_adapter_bytes, manager.hub) == (12345, True)
    assert manager.audit.folder == place.store / AUDIT and manager.is_base_model(MODEL)
    assert registered[0] == (remove_unowned, Path(place.gate.socket).parent, 10.0)
    assert [given.__name__ for (given,) in registered[1:]] == ["close"]  # of the counters' file
    said = {record.getMessage().partition(":")[0]: record.levelname for record in caplog.records}
    assert said["adapters are guarded"] == ("INFO" if mode == "enforce" else "WARNING")
    assert said["keys"] == "INFO"
