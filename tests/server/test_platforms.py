"""A controller's loop and LiteLLM's proxy, in front of the real server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from server import ADMIN_KEY, Server

from tests.server.conftest import TENANT_KEYS, client, first_token, upload
from tests.server.test_controllers import Aibrix, ProductionStack

LITELLM = os.environ.get("LITELLM") or shutil.which("litellm")
CLIENT_KEY = "sk-of-litellm"
MODEL = "acme/orders"


@pytest.mark.parametrize("kind", [ProductionStack, Aibrix])
def test_a_controllers_loop(
    kind: type[ProductionStack | Aibrix], server: Server, admin: httpx.Client, adapters: dict[str, Path]
) -> None:
    wanted = {name: adapters[name] for name in ("qv", "other")}
    before = first_token(admin, "aligned")
    with client(server, ADMIN_KEY) as http:
        controller = kind(http, wanted)
        for _ in range(2):
            controller.reconcile()
        said = [first_token(admin, name) for name in wanted]
        assert before not in said, "the weights are there"
        controller.remove("qv")
        assert admin.post("/v1/completions", json={"model": "qv", "prompt": "x"}).status_code == 404
        kind(http, wanted).reconcile()
        assert [first_token(admin, name)[0] for name in wanted] == [token for token, _ in said]
        assert len(admin.get("/v1/adapters/other/versions").json()["versions"]) == 1


@pytest.fixture
def proxy(server: Server, tmp_path: Path) -> Iterator[httpx.Client]:
    """LiteLLM, which reaches one tenant's adapter with that tenant's key, and with two keys that may not."""
    if not LITELLM:
        pytest.skip(
            "no litellm: install 'litellm[proxy]' into an environment, and set LITELLM to its command"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    models = [
        {"model_name": name, "litellm_params": {
            "model": f"hosted_vllm/{model}", "api_base": f"{server.url}/v1", "api_key": key, "max_retries": 0,
        }}
        for name, model, key in (
            ("orders", MODEL, TENANT_KEYS["acme"]), ("others", MODEL, TENANT_KEYS["globex"]),
            ("wrong", MODEL, "nobody-has-this-key"),
        )
    ]  # fmt: skip
    models.append({"model_name": "own", "litellm_params": {
        "model": f"hosted_vllm/{MODEL}", "api_base": f"{server.url}/v1", "api_key": "none-was-sent",
        "max_retries": 0, "configurable_clientside_auth_params": ["api_key"],
    }})  # fmt: skip
    config = tmp_path / "litellm.json"  # JSON is YAML
    config.write_text(json.dumps({"model_list": models, "general_settings": {"master_key": CLIENT_KEY}}))
    command = [LITELLM, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "litellm.log"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network, three times
    with log.open("wb") as written:
        process = subprocess.Popen(command, stdout=written, stderr=written, env=environment, cwd=tmp_path)
        try:
            headers = {"Authorization": f"Bearer {CLIENT_KEY}"}
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120) as http:
                _wait(http, process, log)
                yield http
        finally:
            process.terminate()
            process.wait(60)


def _wait(http: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if http.get("/health/liveliness").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def test_litellm_in_front(server: Server, proxy: httpx.Client, adapters: dict[str, Path]) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
    with client(server, TENANT_KEYS["acme"]) as acme:
        assert upload(acme, MODEL, adapters["qv"]).status_code == 201
        try:
            direct = acme.post("/v1/chat/completions", json={**body, "model": MODEL}).json()
            answer = proxy.post("/v1/chat/completions", json={**body, "model": "orders"})
            assert answer.status_code == 200, answer.text
            said = direct["choices"][0]["message"]["content"]
            assert answer.json()["choices"][0]["message"]["content"] == said
            streamed = ""
            with proxy.stream(
                "POST", "/v1/chat/completions", json={**body, "model": "orders", "stream": True}
            ) as s:
                assert s.status_code == 200
                lines = [line[6:] for line in s.iter_lines() if line.startswith("data: ")]
            assert lines[-1] == "[DONE]"
            for line in lines[:-1]:
                for choice in json.loads(line)["choices"]:
                    streamed += choice["delta"].get("content") or ""
            assert streamed == said
            unseen = proxy.post("/v1/chat/completions", json={**body, "model": "others"})
            assert unseen.status_code == 404 and "does not exist" in unseen.text
            refused = proxy.post("/v1/chat/completions", json={**body, "model": "wrong"})
            assert refused.status_code == 401 and "needs a key that may use models" in refused.text
            for key, status in ((TENANT_KEYS["acme"], 200), (TENANT_KEYS["globex"], 404), ("wrong", 401)):
                sent = proxy.post("/v1/chat/completions", json={**body, "model": "own", "api_key": key})
                assert sent.status_code == status, "the key that the caller sends passes through"
        finally:
            acme.delete(f"/v1/adapters/{MODEL}")
