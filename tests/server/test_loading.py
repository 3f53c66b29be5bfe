"""Loading and unloading over HTTP while the server runs. What is refused is in `test_http_changes`."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.server.conftest import load, say


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
