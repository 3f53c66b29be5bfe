"""Who may change which adapter, and which names and folders are taken. The engine is a fake one."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from safelora_vllm.settings import ServerSettings
from safelora_vllm.tenants.principal import MODALITIES
from tests.server.conftest import ADMIN_KEY, INFERENCE_KEY, load, upload
from tests.server.fake_engine import FakeEngine, all_routes
from tests.server.fake_server import FakeServer
from tests.server.route_spy import PASSED, RouteSpy
from tests.server.test_tenants import KEYS


@pytest.fixture
def admin(fake: FakeServer) -> TestClient:
    return fake.client(ADMIN_KEY)


@pytest.mark.parametrize("who", KEYS)
def test_changes(fake: FakeServer, admin: TestClient, drafts: dict[str, Path], who: str) -> None:
    """Whoever may not change a name gets 401, 403 or 404, and nothing happens."""
    expected = {
        # (shared, acme/own, globex/own)
        "admin": {"upload": (200, 200, 200), "rollback": (200, 200, 200), "policy": (200, 200, 200)},
        "acme": {"upload": (403, 200, 403), "rollback": (403, 200, 404), "policy": (403, 403, 403)},
        "globex": {"upload": (403, 403, 200), "rollback": (403, 404, 200), "policy": (403, 403, 403)},
        "inference": {"upload": (401,) * 3, "rollback": (401,) * 3, "policy": (401,) * 3},
        "wrong": {"upload": (401,) * 3, "rollback": (401,) * 3, "policy": (401,) * 3},
    }[who]
    deletes = {"admin": (200,) * 3, "acme": (403, 200, 404), "globex": (403, 404, 200)}
    loads = {"admin": 200, "acme": 403, "globex": 403}
    for name in ("shared", "acme/own", "globex/own"):
        assert upload(admin, name, drafts["qv"]).status_code == 201
    http = fake.client(KEYS[who])
    for index, name in enumerate(("shared", "acme/own", "globex/own")):
        got = {
            "upload": upload(http, name, drafts["qv"], replace=True).status_code,
            "rollback": http.post(f"/v1/adapters/{name}/rollback", json={"version": 1}).status_code,
            "policy": http.put(f"/v1/adapters/{name}/policy", json={"policy": {}}).status_code,
        }
        assert got == {action: statuses[index] for action, statuses in expected.items()}, name
        gone = http.delete(f"/v1/adapters/{name}").status_code
        assert gone == deletes.get(who, (401,) * 3)[index], name
    body = {"lora_name": "loaded", "lora_path": str(drafts["qv"])}
    assert http.post("/v1/load_lora_adapter", json=body).status_code == loads.get(who, 401)
    unloaded = http.post("/v1/unload_lora_adapter", json={"lora_name": "loaded"}).status_code
    assert unloaded == loads.get(who, 401)


def test_a_name_is_loaded_once(admin: TestClient, drafts: dict[str, Path]) -> None:
    assert load(admin, "tenant", drafts["qv"]).status_code == 200
    again = load(admin, "tenant", drafts["other"])
    assert again.status_code == 400, "as in vLLM"
    assert again.json()["error"]["type"] == "InvalidUserInput"
    before = admin.get("/v1/adapters/tenant").json()["digest"]
    assert load(admin, "tenant", drafts["other"], load_inplace=True).status_code == 200
    assert admin.get("/v1/adapters/tenant").json()["digest"] != before


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "a/policy", "..", "x" * 200, "new\nline", "aligned", "-x", "ü"]
)
def test_bad_names(admin: TestClient, drafts: dict[str, Path], name: str) -> None:
    answer = load(admin, name, drafts["qv"])
    assert answer.status_code == 400
    assert len(answer.text) < 1000


def test_no_adapter_has_the_name_of_a_part_that_vllm_reads() -> None:
    """vLLM gives chats with such a part, asked of the base model, the adapter called by its first word."""
    from vllm.renderers import chat_utils

    assert {part.partition("_")[0] for part in chat_utils.MM_PARSER_MAP} <= set(MODALITIES)


def test_missing_folder_is_not_found(admin: TestClient, drafts: dict[str, Path]) -> None:
    missing = drafts["qv"].with_name("no-such-folder")
    answer = load(admin, "tenant", missing)
    assert answer.status_code == 404
    assert str(missing) in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/etc", "{root}/../../etc", "{root}/link", "safelora://" + "0" * 64, "org/name"]
)
def test_folders_outside_of_the_roots_are_forbidden(
    admin: TestClient, drafts: dict[str, Path], path: str
) -> None:
    root = drafts["qv"].parent
    (root / "link").symlink_to("/etc")
    path = path.replace("{root}", str(root))
    unknown_scheme = "://" in path  # then it is no folder, and no address of a remote source either
    assert load(admin, "tenant", path).status_code == (422 if unknown_scheme else 403)
    answer = admin.post("/v1/adapters", json={"name": "tenant", "path": path})
    assert answer.status_code == 403


def test_the_operators_middleware_stands_within_the_key_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It may answer or reroute requests, so it gets only those that passed."""
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    settings = ServerSettings("no cache is read", str(tmp_path))
    spy = f"{RouteSpy.__module__}.{RouteSpy.__qualname__}"
    app = all_routes(FakeEngine(), settings, api_key=[INFERENCE_KEY], middleware=[spy])
    for key, status in (("", 401), ("wrong", 401), (INFERENCE_KEY, PASSED), (ADMIN_KEY, PASSED)):
        headers = {"x-spy": "1", "Authorization": f"Bearer {key}"}
        assert TestClient(app).get("/v1/models", headers=headers).status_code == status, key


def test_mutating_routes_need_the_admin_key(fake: FakeServer, drafts: dict[str, Path]) -> None:
    for key in ("an-inference-key", "wrong"):
        http = fake.client(key)
        assert load(http, "tenant", drafts["qv"]).status_code == 401
        assert http.post("/v1/unload_lora_adapter", json={"lora_name": "static"}).status_code == 401
    http = fake.client()
    assert load(http, "tenant", drafts["qv"]).status_code == 401
    assert http.post("/adapters", json={"name": "x", "src": "/tmp"}).status_code == 401
