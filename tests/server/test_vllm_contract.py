"""vLLM's own loading calls mean here what they mean there, and the same twice. The engine is a fake one."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.errors import AdapterRefused, StoreUnavailable, refuse
from safelora_vllm.integration.server import uploads
from safelora_vllm.integration.server.refusal_limit import LINES
from safelora_vllm.integration.server.registry import Registry, being_prepared
from safelora_vllm.store.audit_log import AuditLog
from tests.server.conftest import ADMIN_KEY, TENANT_KEYS, load, upload
from tests.server.fake_server import FakeServer


@pytest.fixture
def admin(fake: FakeServer) -> TestClient:
    return fake.client(ADMIN_KEY)


def actions(fake: FakeServer, name: str) -> list[tuple[str, str]]:
    entries = AuditLog(fake.store / "audit").read()
    return [(entry["action"], entry["decision"]) for entry in entries if entry["adapter"] == name]


def versions(admin: TestClient, name: str) -> list[int]:
    return [v["version"] for v in admin.get(f"/v1/adapters/{name}/versions").json()["versions"]]


@pytest.mark.parametrize("key", ["", "nobody-has-this-key"])
def test_a_wrong_key_is_answered_in_openais_form(fake: FakeServer, key: str) -> None:
    """On vLLM's routes and on ours, on those that are not there, and before a body is looked at."""
    stranger = fake.client(key)
    paths = [
        "models",
        "chat/completions",
        "completions",
        "embeddings",
        "adapters",
        "load_lora_adapter",
        "none",
    ]
    for path in paths:
        for method in ("GET", "POST"):
            answer = stranger.request(method, f"/v1/{path}", content=b"{")
            error = answer.json()["error"]
            assert answer.status_code == error["code"] == 401, path
            assert error["type"] == "AuthenticationError" and error["param"] is None
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert "Authorization: Bearer KEY" in error["message"]
            assert "nobody" not in error["message"], "the key is not repeated"


@pytest.mark.parametrize("more", [{}, {"load_inplace": True}], ids=["load", "in place"])
def test_the_same_content_again_is_200_and_nothing_is_done(
    fake: FakeServer, admin: TestClient, drafts: dict[str, Path], more: dict[str, Any]
) -> None:
    for _ in range(4):
        answer = load(admin, "x", drafts["qv"], **more)
        assert (answer.status_code, answer.text) == (
            200, "Success: LoRA adapter 'x' added successfully.",
        )  # fmt: skip
    assert versions(admin, "x") == [1] and actions(fake, "x") == [("load", "accepted")]
    assert len([request for request in fake.engine.loaded if request.lora_name == "x"]) == 1


def test_an_upload_of_the_same_content_again_is_200(fake: FakeServer, drafts: dict[str, Path]) -> None:
    acme = fake.client(TENANT_KEYS["acme"])
    first = upload(acme, "acme/x", drafts["qv"])
    again = upload(acme, "acme/x", drafts["qv"])
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json() and versions(acme, "acme/x") == [1]
    other = upload(acme, "acme/x", drafts["other"])
    assert (other.status_code, other.json()["error"]["type"]) == (409, "ConflictError")


def test_a_replacement_by_the_same_content_is_a_version_under_other_rules_only(
    fake: FakeServer, admin: TestClient, drafts: dict[str, Path]
) -> None:
    acme, route = fake.client(TENANT_KEYS["acme"]), "/v1/adapters/acme/x/policy"
    first = upload(acme, "acme/x", drafts["qv"], replace=True)
    loaded = len(fake.engine.loaded)
    again = upload(acme, "acme/x", drafts["qv"], replace=True)
    assert (first.status_code, again.status_code) == (201, 200) and again.json() == first.json()
    assert versions(acme, "acme/x") == [1] and len(fake.engine.loaded) == loaded, "nothing was done"
    assert actions(fake, "acme/x") == [("upload", "accepted"), ("upload", "unchanged")]
    said = {"decision": "unchanged", "adapter": "acme/x"}
    (line,) = acme.get("/v1/audit", params=said).json()["records"]
    assert (line["version"], line["actor"], line["reasons"]) == (1, "acme/ci", [])
    loosened = {"policy": {"select": "number", "number": 3}, "override": True, "reason": "a trusted author"}
    assert admin.put(route, json=loosened).status_code == 200
    taken_back = upload(acme, "acme/x", drafts["qv"], replace=True)
    assert (taken_back.status_code, taken_back.json()["version"]) == (201, 3), "an override was for version 2"
    assert taken_back.json()["policy"] == first.json()["policy"]
    assert admin.put(route, json={"policy": {"max_relative_norm": 0.9}}).status_code == 200
    assert upload(acme, "acme/x", drafts["qv"], replace=True).status_code == 200, (
        "this rule holds for the name"
    )
    assert upload(acme, "acme/x", drafts["other"], replace=True).status_code == 201
    assert versions(acme, "acme/x") == [1, 2, 3, 4, 5]


def test_many_replacements_by_the_same_content_are_few_lines_of_the_audit_log(
    fake: FakeServer, drafts: dict[str, Path]
) -> None:
    acme = fake.client(TENANT_KEYS["acme"])
    for _ in range(LINES + 5):
        assert upload(acme, "acme/x", drafts["qv"], replace=True).status_code in (200, 201)
    assert actions(fake, "acme/x") == [("upload", "accepted"), *[("upload", "unchanged")] * LINES]


def test_a_taken_name_is_answered_in_vllms_words(admin: TestClient, drafts: dict[str, Path]) -> None:
    """Nested, as vLLM 0.32 does, and at the top, as its older releases did."""
    assert load(admin, "x", drafts["qv"]).status_code == 200
    for name in ("x", "static"):
        answer = load(admin, name, drafts["other"])
        assert answer.status_code == 400, name
        body = answer.json()
        for fields in (body, body["error"]):
            assert fields["type"] == "InvalidUserInput" and fields["code"] == 400
            assert f"The lora adapter '{name}' has already been loaded" in fields["message"]
    assert body["object"] == "error"
    assert load(admin, "x", drafts["other"], load_inplace=True).status_code == 200


def test_unloading_what_is_not_there_is_answered_in_vllms_words(admin: TestClient) -> None:
    answer = admin.post("/v1/unload_lora_adapter", json={"lora_name": "none"})
    body = answer.json()
    assert answer.status_code == 404
    for fields in (body, body["error"]):
        assert fields["type"] == "NotFoundError" and fields["message"] == (
            "The lora adapter 'none' cannot be found."
        )


def test_answers_agree_with_vllms(fake: FakeServer, drafts: dict[str, Path]) -> None:
    """With vLLM's own class, for the same calls. It has the reference; ours adds only the cause."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

    admin = fake.client(ADMIN_KEY)
    models = object.__new__(OpenAIServingModels)
    models.lora_requests = {"x": None}
    models.registry = type("None", (), {"is_base_model": staticmethod(lambda _: False)})()
    assert load(admin, "x", drafts["qv"]).status_code == 200
    given = LoadLoRAAdapterRequest(lora_name="x", lora_path="/other")
    theirs = fake.portal.call(models._check_load_lora_adapter_request, given).error
    ours = load(admin, "x", drafts["other"]).json()["error"]
    assert (ours["type"], ours["code"]) == (theirs.type, theirs.code)
    assert ours["message"].split(" loaded")[0] == theirs.message.split(" loaded")[0].replace("\n", "")
    unload = UnloadLoRAAdapterRequest(lora_name="none")
    theirs = fake.portal.call(models._check_unload_lora_adapter_request, unload).error
    ours = admin.post("/v1/unload_lora_adapter", json={"lora_name": "none"}).json()["error"]
    assert (ours["type"], ours["code"], ours["message"]) == (theirs.type, theirs.code, theirs.message)


@pytest.mark.parametrize(
    "problem",
    [StoreUnavailable("damaged"), being_prepared("x"), refuse("total_norm", "too large")],
    ids=["lost", "prepared", "refused"],
)
def test_a_name_that_is_not_served_now_is_healed_by_a_load(
    fake: FakeServer, admin: TestClient, drafts: dict[str, Path], problem: Exception
) -> None:
    """As a controller sees it: not in the list, so it is loaded again."""
    registry: Registry = fake.app.state.safelora.registry

    def withdraw() -> None:
        registry["x"] = replace(registry["x"], served=None, problem=problem)  # type: ignore[arg-type]
        assert "x" not in [model["id"] for model in admin.get("/v1/models").json()["data"]]

    assert load(admin, "x", drafts["qv"]).status_code == 200
    withdraw()
    assert load(admin, "x", drafts["qv"]).status_code == 200
    assert "x" in [model["id"] for model in admin.get("/v1/models").json()["data"]]
    assert versions(admin, "x") == [1], "the same content, the same version"
    withdraw()
    assert upload(admin, "x", drafts["other"]).status_code == 409, "ours keep what they say"
    refused = isinstance(problem, AdapterRefused)  # else it may be back in a moment, and is not replaced
    assert load(admin, "x", drafts["other"]).status_code == (200 if refused else 400)
    assert versions(admin, "x") == ([1, 2] if refused else [1])


def test_a_hub_id_needs_the_operators_word(
    fake: FakeServer, admin: TestClient, drafts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(hub_id: str, revision: str | None, folder: Path, most: int, token: bool) -> Path:
        asked.append((hub_id, revision, most, token))
        for name in (CONFIG, WEIGHTS):
            (folder / name).write_bytes((drafts["qv"] / name).read_bytes())
        return folder

    monkeypatch.setattr(uploads, "download", download)
    refused = load(admin, "x", "organisation/adapter")
    assert refused.status_code == 403 and "--allow-hub" in refused.json()["error"]["message"]
    assert asked == []
    managed = fake.app.state.safelora_manager
    managed.hub = True
    assert load(admin, "x", "organisation/adapter").status_code == 200
    assert load(admin, "x", "organisation/adapter").status_code == 200
    assert asked == [("organisation/adapter", None, managed.max_adapter_bytes, True)] * 2
    assert versions(admin, "x") == [1]
    with ExitStack() as held:  # a download is an upload, which are counted
        while fake.app.state.safelora_upload_limiter._free:
            held.enter_context(fake.app.state.safelora_upload_limiter.take(None))
        assert load(admin, "y", "organisation/adapter").status_code == 429
    assert list((fake.store / "incoming").iterdir()) == [], "nothing is left"
    assert load(fake.client(TENANT_KEYS["acme"]), "acme/x", "organisation/adapter").status_code == 403


def hub_cache(folder: Path, draft: Path) -> Path:
    """A repository as the hub's client keeps it: a snapshot of links to blobs."""
    snapshot, blobs = folder / "models--o--a" / "snapshots" / "1", folder / "models--o--a" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate((CONFIG, WEIGHTS)):
        (blobs / str(number)).write_bytes((draft / name).read_bytes())
        (snapshot / name).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot


def test_a_hub_cache_inside_of_a_root_is_loaded(
    fake: FakeServer, admin: TestClient, drafts: dict[str, Path], tmp_path: Path
) -> None:
    snapshot = hub_cache(tmp_path / "hub", drafts["qv"])
    assert load(admin, "x", snapshot).status_code == 200
    assert load(admin, "x", drafts["qv"]).status_code == 200, "the same content"
    assert versions(admin, "x") == [1]
    assert list((fake.store / "incoming").iterdir()) == []


def test_links_that_lead_out_of_the_roots_are_not_followed(
    fake: FakeServer, admin: TestClient, drafts: dict[str, Path], tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    outside = tmp_path_factory.mktemp("outside") / "weights"
    outside.write_bytes((drafts["qv"] / WEIGHTS).read_bytes())
    snapshot = hub_cache(tmp_path / "hub", drafts["qv"])
    blobs = snapshot.parents[1] / "blobs"
    (blobs / "folder").mkdir()
    (blobs / "big").write_bytes(b"0" * (fake.app.state.safelora_manager.max_adapter_bytes + 1))
    inside = tmp_path / "of-another-repository"
    inside.write_bytes(outside.read_bytes())
    for target, status in (
        (outside, 403), (inside, 403), (blobs / "none", 400), (blobs / "folder", 400), (blobs / "big", 413),
    ):  # fmt: skip
        (snapshot / WEIGHTS).unlink()
        (snapshot / WEIGHTS).symlink_to(target)
        assert load(admin, "x", snapshot).status_code == status, target
    plain = Path(shutil.copytree(drafts["qv"], tmp_path / "plain"))
    (plain / WEIGHTS).unlink()
    (plain / WEIGHTS).symlink_to(inside)
    assert load(admin, "x", plain).status_code == 422, "a folder of no hub cache: the gate follows no link"
    fake.app.state.safelora_manager.roots = ()
    answer = load(admin, "x", snapshot)
    assert answer.status_code == 422 and "hf download" in answer.json()["error"]["message"]
