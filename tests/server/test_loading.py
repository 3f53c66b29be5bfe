"""Loading and unloading over HTTP while the server runs."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from server import Server

from tests.server.conftest import client, load, say


def test_load_serve_unload(admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path]) -> None:
    assert load(admin, "tenant", adapters["qv"]).status_code == 200
    cards = {card["id"]: card for card in user.get("/v1/models").json()["data"]}
    assert cards["tenant"]["root"].startswith("safelora://")
    assert str(adapters["qv"]) not in user.get("/v1/models").text
    assert say(user, "tenant")
    assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "tenant"}).status_code == 200
    gone = user.post("/v1/completions", json={"model": "tenant", "prompt": "x"})
    assert gone.status_code == 404
    assert admin.post("/v1/unload_lora_adapter", json={"lora_name": "tenant"}).status_code == 404


def test_report(admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path]) -> None:
    load(admin, "tenant", adapters["all"])
    report = user.get("/v1/adapters/tenant").json()
    assert report["adapter"] == "tenant" and report["accepted"] and report["reasons"] == []
    assert {module["decision"] for module in report["modules"]} == {"projected"}
    assert len(report["modules"]) == 210
    listed = {entry["adapter"] for entry in user.get("/v1/adapters").json()["data"]}
    assert listed == {"static", "tenant"}
    assert user.get("/v1/adapters/nobody").status_code == 404


def test_a_name_is_loaded_once(admin: httpx.Client, adapters: dict[str, Path]) -> None:
    assert load(admin, "tenant", adapters["qv"]).status_code == 200
    again = load(admin, "tenant", adapters["other"])
    assert again.status_code == 409
    assert again.json()["error"]["type"] == "ConflictError"
    before = admin.get("/v1/adapters/tenant").json()["digest"]
    assert load(admin, "tenant", adapters["other"], load_inplace=True).status_code == 200
    assert admin.get("/v1/adapters/tenant").json()["digest"] != before


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "a/policy", "..", "x" * 200, "new\nline", "aligned", "-x", "ü"]
)
def test_bad_names(admin: httpx.Client, adapters: dict[str, Path], name: str) -> None:
    answer = load(admin, name, adapters["qv"])
    assert answer.status_code == 400
    assert len(answer.text) < 1000


def test_missing_folder_is_not_found(admin: httpx.Client, adapters: dict[str, Path]) -> None:
    missing = adapters["qv"].with_name("no-such-folder")
    answer = load(admin, "tenant", missing)
    assert answer.status_code == 404
    assert str(missing) in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/etc", "{root}/../../etc", "safelora://" + "0" * 64, "org/name"])
def test_folders_outside_of_the_roots_are_forbidden(
    admin: httpx.Client, adapters: dict[str, Path], path: str
) -> None:
    path = path.replace("{root}", str(adapters["qv"].parent))
    assert load(admin, "tenant", path).status_code == 403
    answer = admin.post("/v1/adapters", json={"name": "tenant", "path": path})
    assert answer.status_code == 403


def test_mutating_routes_need_the_admin_key(server: Server, adapters: dict[str, Path]) -> None:
    for key in ("an-inference-key", "wrong"):
        with client(server, key) as http:
            assert load(http, "tenant", adapters["qv"]).status_code == 401
            assert http.post("/v1/unload_lora_adapter", json={"lora_name": "static"}).status_code == 401
    with httpx.Client(base_url=server.url) as http:
        assert load(http, "tenant", adapters["qv"]).status_code == 401
        assert http.post("/adapters", json={"name": "x", "src": "/tmp"}).status_code == 401
