"""With anything missing or wrong, no adapter is served and the cause is said."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from pathlib import Path

import httpx
import pytest
from server import ServerDied, guarded, plain, running

from safelora_vllm.errors import GuardError
from safelora_vllm.integration.server import engine as pool
from tests.server.fake_engine import FakeEngine

REQUIRED = "--worker-extension-cls=safelora_vllm.integration.required.Guard"
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
    assert "another aligned model" in run.stderr and "Traceback" not in run.stderr


def test_plain_vllm_without_settings_does_not_start(aligned: Path, tmp_path: Path) -> None:
    log = start_and_fail(plain(aligned, "--enable-lora"), PLUGIN, tmp_path)
    assert "has no projector cache" in log


def test_plain_vllm_with_a_cache_for_another_model(aligned: Path, projectors: Path, tmp_path: Path) -> None:
    command = plain(aligned.with_name("base"), "--enable-lora", config(projectors=str(projectors)))
    assert "another aligned model" in start_and_fail(command, PLUGIN, tmp_path)


def test_runtime_updating_is_refused(aligned: Path, projectors: Path, tmp_path: Path) -> None:
    command = plain(aligned, "--enable-lora", config(projectors=str(projectors)))
    log = start_and_fail(command, {**PLUGIN, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, tmp_path)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING opens loading routes" in log


def test_broken_import_with_the_extension_does_not_start(
    aligned: Path, projectors: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    command = plain(
        aligned, "--enable-lora", config(projectors=str(projectors)), REQUIRED,
        f"--lora-modules=static={adapters['static']}",
    )  # fmt: skip
    assert "made by a test" in start_and_fail(command, broken_plugin(tmp_path), tmp_path)


def test_broken_import_without_it_has_no_way_to_load(
    aligned: Path, projectors: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    command = plain(aligned, "--enable-lora", config(projectors=str(projectors)))
    log = tmp_path / "server.log"
    body = {"lora_name": "x", "lora_path": str(adapters["qv"])}
    with running(command, log, broken_plugin(tmp_path)) as server:
        assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).status_code == 404
        assert len(httpx.get(f"{server.url}/v1/models").json()["data"]) == 1
    assert re.search(r"Failed to load plugin safelora", log.read_text())


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
