"""``VLLM_ALLOW_RUNTIME_LORA_UPDATING``, which platforms set: accepted, and what it opens stays shut.

The list of what it opens is not written down here: vLLM's application is built with it and without.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from vllm import envs

from safelora_vllm.errors import GuardError
from safelora_vllm.integration import plugin, runtime_updating
from safelora_vllm.integration.seams import checks, fixes
from safelora_vllm.integration.seams import worker as seams
from safelora_vllm.integration.server.access_rules import REFUSED, TABLE, Access
from safelora_vllm.integration.server.routes import router
from safelora_vllm.settings import ServerSettings
from tests.server.conftest import ADMIN_KEY, INFERENCE_KEY, TENANT_KEYS
from tests.server.fake_engine import FakeEngine, all_routes
from tests.server.fake_server import FakeServer, Place

VARIABLE = runtime_updating.VARIABLE


def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM calls in every process, without its changes of vLLM."""
    monkeypatch.setattr(checks, "check", lambda _: None)
    monkeypatch.setattr(seams, "install", lambda *_: None)
    monkeypatch.setattr(fixes, "apply", lambda _: None)
    plugin.register()
    monkeypatch.undo()


def names(app: FastAPI) -> set[str]:
    found = set()
    for route in app.router.routes:
        for method in getattr(route, "methods", None) or ():
            found.add(f"{method} {getattr(route, 'path', '')}")
    return found


# SageMaker's handlers are registered for the whole process, so the application without them comes first.
PLAIN = """
import json, os, sys
from argparse import Namespace
try:
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import FrontendArgs
except ImportError:  # 0.28
    from vllm.entrypoints.openai.api_server import build_app
    from vllm.entrypoints.openai.cli_args import FrontendArgs

def names(value):
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = value
    args = Namespace(**vars(FrontendArgs()), enable_fault_tolerance=False)
    routes = build_app(args, ("generate",)).router.routes
    return {f"{m} {r.path}" for r in routes for m in getattr(r, "methods", None) or ()}

without = names("0")
print("\\n" + json.dumps(sorted(names("1") - without)))
"""


def opened_by_the_variable() -> set[str]:
    """The routes that vLLM's application has with the variable only, without this package."""
    environment = {**os.environ, "VLLM_PLUGINS": ""}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("value", ["1", "true", " True "])
def test_the_variable_is_off_once_the_plugin_is_there(value: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "vllm.safelora"), pytest.MonkeyPatch.context() as inner:
        os.environ[VARIABLE] = value
        try:
            assert envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING and runtime_updating.is_on()
            registered(inner)
            assert not envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING and not runtime_updating.is_on()
            assert os.environ[VARIABLE] == "0", "so processes that are started now have it off too"
        finally:
            del os.environ[VARIABLE]
    assert "is switched off" in caplog.text


def test_every_way_in_that_the_variable_opens_stays_shut(
    cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafts: dict[str, Path]
) -> None:
    opened = opened_by_the_variable()
    assert {"POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter"} <= opened
    assert {"POST /adapters", "DELETE /adapters/{adapter_name}"} <= opened, "SageMaker's"
    ours = {f"{method} {route.path}" for route in router.routes for method in route.methods}  # type: ignore[attr-defined]
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.MonkeyPatch.context() as patch:
        registered(patch)
    with Place.start(cache, tmp_path, select="all") as place, place.server(api_key=INFERENCE_KEY) as server:
        there = names(server.app)
        for name in sorted(opened):
            method, _, path = name.partition(" ")
            assert name in ours or name not in there, name
            assert TABLE[name] is Access.ADMINS
            body = {"name": "x", "src": str(drafts["qv"]), "lora_name": "x", "lora_path": str(drafts["qv"])}
            for key in ("", "wrong", INFERENCE_KEY):
                url = path.replace("{adapter_name}", "x")
                answer = server.client(key).request(method, url, json=body)
                assert answer.status_code == (404 if key == INFERENCE_KEY and name not in there else 401), (
                    name
                )
        assert server.client(ADMIN_KEY).post("/adapters", json=body).status_code == 404
        assert server.engine.loaded == []
        server.client(ADMIN_KEY).post("/v1/completions", json={"model": str(drafts["qv"]), "prompt": "x"})
        assert server.engine.loaded == [], "no resolver is asked"
        loaded = server.client(ADMIN_KEY).post(
            "/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(drafts["qv"])}
        )
        assert loaded.status_code == 200
        assert [request.lora_path[:11] for request in server.engine.loaded] == ["safelora://"]


def test_sagemakers_routes_would_be_refused_even_if_they_were_there() -> None:
    assert {"POST /adapters", "DELETE /adapters/{adapter_name}"} <= set(REFUSED)


def test_a_front_end_that_vllm_built_with_the_variable_is_not_guarded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its parent runs without the plugin: that process would have switched it off."""
    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    runtime_updating.switch_off()
    assert runtime_updating.is_on(), "a child does not hide what its parent has"
    with pytest.raises(GuardError, match="has not loaded safelora"):
        plugin.endpoint().attach_router(FastAPI())
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    with pytest.raises(GuardError, match="has not loaded safelora"):
        all_routes(FakeEngine(), ServerSettings("no cache is read", str(tmp_path)))


def test_a_front_end_without_the_plugin_ends_at_the_gate(fake: FakeServer) -> None:
    """Such as gRPC's: it has no names of ours, and vLLM's map of them cannot be written to."""
    models = fake.app.state.openai_serving_models
    with pytest.raises(TypeError):
        models.lora_requests["x"] = object()
    assert fake.client(TENANT_KEYS["acme"]).post("/adapters", json={"name": "x"}).status_code == 403
