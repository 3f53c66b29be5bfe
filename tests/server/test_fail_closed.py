"""With anything missing or wrong, no adapter is served and the cause is said."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from server import ServerDied, guarded, plain, running

from safelora_vllm.errors import GuardError
from safelora_vllm.integration.server import engine as pool
from safelora_vllm.integration.worker.guard import WorkerGuard
from tests.server.fake_engine import FakeEngine
from tests.server.fake_server import Place

REQUIRED = "--worker-extension-cls=safelora_vllm.integration.required.Guard"
PLUGIN_MODULE = "safelora_vllm.integration.plugin"
PLUGIN = {"VLLM_PLUGINS": "safelora"}


def config(**section: object) -> str:
    return f"--additional-config={json.dumps({'safelora': section})}"


def broken_plugin(folder: Path) -> dict[str, str]:
    """An environment in which every process fails to import the plugin's module."""
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'safelora_vllm.integration.plugin':\n"
        "            raise ImportError('broken installation, made by a test')\n"
        "sys.meta_path.insert(0, Broken())\n"
    )
    return {**PLUGIN, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def start_and_fail(command: list[str], env: dict[str, str], tmp_path: Path) -> str:
    """The whole log of a server that must not come up."""
    log = tmp_path / "server.log"
    with pytest.raises(ServerDied), running(command, log, env):
        raise AssertionError("the server came up")
    return log.read_text()


def test_serve_without_a_cache_says_how_to_make_one(aligned: Path, tmp_path: Path) -> None:
    run = subprocess.run(guarded(aligned, tmp_path / "none", tmp_path), capture_output=True, text=True)
    assert run.returncode == 2
    assert "safelora-vllm build" in run.stderr and "Traceback" not in run.stderr


def test_serve_with_a_cache_for_another_model(aligned: Path, projectors: Path, tmp_path: Path) -> None:
    base = aligned.with_name("base")
    run = subprocess.run(guarded(base, projectors, tmp_path), capture_output=True, text=True)
    assert run.returncode == 2
    assert "is not a copy of the aligned model" in run.stderr and "Traceback" not in run.stderr


def test_plain_vllm_with_a_cache_for_another_model(aligned: Path, projectors: Path, tmp_path: Path) -> None:
    """A worker whose guard cannot be made stops the server. What else a guard refuses comes below."""
    command = plain(aligned.with_name("base"), "--enable-lora", config(projectors=str(projectors)))
    assert "is not a copy of the aligned model" in start_and_fail(command, PLUGIN, tmp_path)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a worker's guard is given by a server that was started with the plugin and without settings."""
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    return SimpleNamespace(
        weight_transfer_config=None, kv_transfer_config=None, lora_config=None, additional_config={}
    )


def test_a_worker_without_settings_does_not_start(worker: SimpleNamespace) -> None:
    with pytest.raises(GuardError, match="has no projector cache"):
        WorkerGuard(worker, torch.device("cpu"))


def test_a_cache_that_mixes_adapters_up_is_refused(worker: SimpleNamespace) -> None:
    """Also where another option of vLLM has chosen it, such as --kv-offloading-backend."""
    worker.kv_transfer_config = SimpleNamespace(kv_connector="LMCacheConnectorV1")
    with pytest.raises(GuardError, match="LMCacheConnectorV1"):
        WorkerGuard(worker, torch.device("cpu"))


def test_runtime_updating_is_refused(worker: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    with pytest.raises(
        GuardError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING is on, and the process that started"
    ):
        WorkerGuard(worker, torch.device("cpu"))


def test_broken_import_with_the_extension_does_not_start(
    aligned: Path, projectors: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    command = plain(
        aligned, "--enable-lora", config(projectors=str(projectors)), REQUIRED,
        f"--lora-modules=static={adapters['static']}",
    )  # fmt: skip
    assert "made by a test" in start_and_fail(command, broken_plugin(tmp_path), tmp_path)


class BrokenImport:
    """A finder that has the plugin's module, which cannot be imported."""

    @staticmethod
    def find_spec(name: str, _path: object = None, _target: object = None) -> None:
        if name == PLUGIN_MODULE:
            raise ImportError("broken installation, made by a test")


@pytest.mark.parametrize("broken", [False, True])
def test_broken_import_without_it_has_no_way_to_load(
    broken: bool, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM logs it and goes on. Then its application has no route by which an adapter is loaded."""
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    if broken:
        monkeypatch.delitem(sys.modules, PLUGIN_MODULE, raising=False)
        monkeypatch.setattr(sys, "meta_path", [BrokenImport(), *sys.meta_path])
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("vllm").addHandler(handler)
    try:
        with place.server() as server:
            http = server.client()
            body = {"lora_name": "x", "lora_path": str(tmp_path)}
            loaded = http.post("/v1/load_lora_adapter", json=body)
            models = http.get("/v1/models").json()["data"]
    finally:
        logging.getLogger("vllm").removeHandler(handler)
    assert loaded.status_code == (404 if broken else 401)
    assert len(models) == 1 and server.engine.loaded == []
    assert any("Failed to load plugin safelora" in message for message in messages) == broken


def test_plain_vllm_guarded(
    aligned: Path, projectors: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The second way of the README, and a random admin key that is printed once."""
    section = config(projectors=str(projectors), store=str(tmp_path / "store"))
    log = tmp_path / "server.log"
    env = {**PLUGIN, "SAFELORA_ADMIN_API_KEY": ""}
    with running(plain(aligned, "--enable-lora", section, REQUIRED), log, env) as server:
        keys = re.findall(r"choose it\): (\S+)", log.read_text())
        assert len(keys) == 1
        body = {"lora_name": "x", "lora_path": str(adapters["qv"])}
        url = f"{server.url}/v1/load_lora_adapter"
        assert httpx.post(url, json=body).status_code == 401
        header = {"Authorization": f"Bearer {keys[0]}"}
        assert httpx.post(url, json=body, headers=header, timeout=60).status_code == 200
        assert httpx.get(f"{server.url}/v1/adapters/x").json()["modules"]
        # Without an inference key the base model is open, as in vLLM. Nothing else is.
        assert log.read_text().count("no --api-key is set") == 1
        question = {"model": "aligned", "prompt": "x"}
        assert httpx.post(f"{server.url}/tokenize", json=question).status_code == 200
        assert httpx.get(f"{server.url}/load").status_code == 401
        assert httpx.get(f"{server.url}/none").status_code == 404


def test_a_changed_seam_of_the_api_server_does_not_start(
    aligned: Path, projectors: Path, tmp_path: Path
) -> None:
    """As a vLLM would have it whose requests no longer say which adapter they use."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "class Change:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'vllm.v1.engine.output_processor':\n"
        "            sys.meta_path.remove(self)\n"
        "            spec = importlib.util.find_spec(name)\n"
        "            run = spec.loader.exec_module\n"
        "            def exec_module(module):\n"
        "                run(module)\n"
        "                module.RequestState.__init__ = lambda self: None\n"
        "            spec.loader.exec_module = exec_module\n"
        "            return spec\n"
        "sys.meta_path.insert(0, Change())\n"
    )
    env = {**PLUGIN, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = plain(aligned, "--enable-lora", config(projectors=str(projectors)))
    assert "seam 'in flight'" in start_and_fail(command, env, tmp_path)


GUARDED = {"guarded": True, "projectors": "p", "policy": "q", "socket": "s", "lost": []}


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [[]],
        [[GUARDED], AttributeError("no attribute 'safelora_attest'")],
        [[GUARDED, {"guarded": False}]],
        [[GUARDED], [{**GUARDED, "policy": "other"}]],
        [[GUARDED, ["generate"]]],
        [[GUARDED], [{**GUARDED, "projectors": "other"}]],
    ],
)
def test_attestation(answers: list[object]) -> None:
    with pytest.raises(GuardError):
        asyncio.run(pool.ask_workers(FakeEngine(lambda: answers)))
