"""Who may do what: every route, with every kind of key, on every kind of adapter.

Who may change what is in `test_http_changes`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from server import Server

from tests.server.conftest import ADMIN_KEY, INFERENCE_KEY, TENANT_KEYS, client, first_token, upload

KEYS = {"admin": ADMIN_KEY, "acme": TENANT_KEYS["acme"], "globex": TENANT_KEYS["globex"]}
KEYS |= {"inference": INFERENCE_KEY, "wrong": "no-key-of-anybody"}
CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
QUESTION = {"type": "choice", "criteria": {"one": "the first", "two": "the second"}}


def uses(path: str, body: dict[str, object]) -> Callable[[httpx.Client, str], httpx.Response]:
    return lambda http, name: http.post(path, json={"model": name, **body})


def invokes(body: dict[str, object]) -> Callable[[httpx.Client, str], httpx.Response]:
    """SageMaker's route takes the name from a header, and answers for the base model without one."""

    def call(http: httpx.Client, name: str) -> httpx.Response:
        return http.post("/invocations", json=body, headers={"X-Amzn-SageMaker-Adapter-Identifier": name})

    return call


# Every route that takes a model's name.
USES = {
    "completions": uses("/v1/completions", {"prompt": "x", "max_tokens": 1}),
    "chat": uses("/v1/chat/completions", CHAT),
    "responses": uses("/v1/responses", {"input": "x", "max_output_tokens": 1}),
    "messages": uses("/v1/messages", CHAT),
    "count_tokens": uses("/v1/messages/count_tokens", {"messages": CHAT["messages"]}),
    "invocations": invokes({"prompt": "x", "max_tokens": 1}),
    "invocations chat": invokes(CHAT),
    "tokenize": uses("/tokenize", {"prompt": "x"}),
    "detokenize": uses("/detokenize", {"tokens": [1]}),
    "generate": uses("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"max_tokens": 1}}),
    "render": uses("/v1/completions/render", {"prompt": "x", "max_tokens": 1}),
    "render chat": uses("/v1/chat/completions/render", CHAT),
    "render messages": uses("/v1/messages/render", CHAT),
    "render responses": uses("/v1/responses/render", {"input": "x"}),
    "batch": uses("/v1/chat/completions/batch", {**CHAT, "messages": [CHAT["messages"]]}),
    "scoring": uses("/generative_scoring", {"query": "x", "items": ["y"], "label_token_ids": [1, 2]}),
    "decisions": uses("/v1/systemone", {"state": "x", "questions": {"q": QUESTION}}),
}
NO_WEIGHTS = {"/v1/completions/derender", "/v1/chat/completions/derender"}  # tokens to text only
LOOKS = {
    "report": lambda http, name: http.get(f"/v1/adapters/{name}"),
    "versions": lambda http, name: http.get(f"/v1/adapters/{name}/versions"),
}
# (who, adapter) → status of using it. The tenants' own, the shared one, the base model, nobody's.
NAMES = ("aligned", "shared", "acme/own", "globex/own", "acme/none")
ALLOWED = {
    "admin": {"aligned", "shared", "acme/own", "globex/own"},
    "acme": {"aligned", "shared", "acme/own"},
    "globex": {"aligned", "shared", "globex/own"},
    "inference": {"aligned", "shared"},
}


@pytest.fixture
def owned(admin: httpx.Client, adapters: dict[str, Path]) -> None:
    for name in ("shared", "acme/own", "globex/own"):
        assert upload(admin, name, adapters["qv"], replace=True).status_code == 201


@pytest.mark.usefixtures("owned")
def test_every_route_obeys(server: Server) -> None:
    with client(server, ADMIN_KEY) as admin:
        routes = admin.get("/openapi.json").json()["paths"]
    wrong = []
    for who, key in KEYS.items():
        with client(server, key) as http:
            for route, call in {**USES, **LOOKS}.items():
                for name in NAMES:
                    answer = call(http, name)
                    path = answer.request.url.path
                    if route in USES and path not in routes:
                        continue  # this vLLM does not have it
                    if answer.status_code == 501:
                        continue  # this model does not have it
                    if route in LOOKS and name == "aligned":
                        continue  # no adapter
                    if who == "wrong":
                        good = answer.status_code == 401
                    elif name in ALLOWED[who]:
                        good = answer.status_code == 200
                    else:
                        good = answer.status_code == 404
                    if not good:
                        wrong.append((who, route, name, answer.status_code, answer.text[:200]))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.usefixtures("owned")
def test_no_route_that_takes_a_name_is_forgotten(server: Server) -> None:
    """Also those that a newer vLLM brings: whatever has a field ``model`` has to be in `USES`."""
    with client(server, ADMIN_KEY) as admin:
        documented = admin.get("/openapi.json").json()
        tried = {call(admin, "nobody").request.url.path for call in USES.values()}

    def fields(schema: dict[str, Any]) -> set[str]:
        if "$ref" in schema:
            return fields(documented["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
        parts = [*schema.get("anyOf", []), *schema.get("oneOf", []), *schema.get("allOf", [])]
        return set(schema.get("properties", {})).union(*map(fields, parts))

    with_name = {
        path
        for path, methods in documented["paths"].items()
        for operation in methods.values()
        for body in operation.get("requestBody", {}).get("content", {}).values()
        if "model" in fields(body["schema"])
    }
    assert len(with_name) > 5
    assert with_name <= tried | NO_WEIGHTS, with_name - tried


@pytest.mark.usefixtures("owned")
def test_models_shows_own_and_shared_only(server: Server) -> None:
    for who, allowed in ALLOWED.items():
        with client(server, KEYS[who]) as http:
            shown = {card["id"] for card in http.get("/v1/models").json()["data"]}
            assert shown - {"static"} == allowed, who
            listed = {report["adapter"] for report in http.get("/v1/adapters").json()["data"]}
            assert listed - {"static"} == allowed - {"aligned"}, who


@pytest.mark.usefixtures("owned")
def test_no_route_loads_or_removes_without_a_key(server: Server) -> None:
    """Every route that the server documents or hides, called with an inference key and with none."""
    with client(server, ADMIN_KEY) as admin:
        paths = admin.get("/openapi.json").json()["paths"]
        before = admin.get("/v1/adapters").json()
        hidden = ["/adapters", "/adapters/shared", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
        hidden += ["/load_lora_adapter", "/unload_lora_adapter", "/collective_rpc", "/server_info"]
        bodies = [
            {"lora_name": "x", "lora_path": "/tmp", "name": "x", "src": "/tmp", "path": "/tmp"},
            {"lora_name": "shared", "name": "shared", "model": "none", "version": 1, "policy": {}},
        ]
        for key in (INFERENCE_KEY, ""):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
                for path in [*paths, *hidden]:
                    for method in ("POST", "PUT", "DELETE", "PATCH"):
                        for body in bodies:
                            url = path.replace("{name}", "shared").replace("{response_id}", "x")
                            url = url.replace("{number}", "1")
                            http.request(method, url.replace("{adapter_name}", "shared"), json=body)
        after = admin.get("/v1/adapters").json()
    assert after == before
    changing = {
        path
        for path, methods in paths.items()
        if "adapter" in path and set(methods) & {"post", "put", "delete", "patch"}
    }
    assert changing == {
        "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters", "/v1/adapters/{name}",
        "/v1/adapters/{name}/rollback", "/v1/adapters/{name}/policy", "/v1/adapters/{name}/versions/{number}",
        "/v1/adapters/{name}/exam",
    }, json.dumps(sorted(changing))  # fmt: skip


def test_an_edit_of_the_keys_file_reaches_the_weights_without_a_gap(
    server: Server, admin: httpx.Client, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Each answer is by the old rules or by the new ones: never an error, never the model alone."""
    keys = tmp_path_factory.getbasetemp() / "keys.toml"
    before = keys.read_text()
    edited = f'{before}[tenants.globex]\nless_strict = true\npolicy = {{mode = "report-only"}}\n'
    with client(server, TENANT_KEYS["globex"]) as globex:
        for http, name in ((globex, "globex/x"), (admin, "unprojected")):
            assert upload(http, name, adapters["qv"]).status_code == 201
        body = {"policy": {"mode": "report-only"}, "override": True, "reason": "to compare"}
        assert admin.put("/v1/adapters/unprojected/policy", json=body).status_code == 200
        projected, unprojected = first_token(globex, "globex/x"), first_token(globex, "unprojected")
        assert projected != unprojected
        try:
            for text, old, new in ((edited, projected, unprojected), (before, unprojected, projected)):
                keys.write_text(text)
                until = time.monotonic() + 60
                while (found := first_token(globex, "globex/x")) != new and time.monotonic() < until:
                    assert found == old
                assert found == new
        finally:
            keys.write_text(before)
        assert globex.get("/v1/usage").json()["used"]["adapters"] == 1
