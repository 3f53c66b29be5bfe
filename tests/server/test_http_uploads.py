"""Uploading, replacing, rolling back, re-judging and removing adapters over HTTP, with a fake engine."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.errors import UsageError
from safelora_vllm.integration.server import uploads
from safelora_vllm.store import NameStore
from safelora_vllm.store.audit_log import AuditLog
from tests.server.conftest import ADMIN_KEY, INFERENCE_KEY, MAX_BYTES, TENANT_KEYS, metric_samples, upload
from tests.server.fake_server import FakeServer
from tests.tiny import Q0, Draft, lora, lora_config


@pytest.fixture
def admin(fake: FakeServer) -> TestClient:
    return fake.client(ADMIN_KEY)


@pytest.fixture
def user(fake: FakeServer) -> TestClient:
    return fake.client(INFERENCE_KEY)


@pytest.fixture
def store(fake: FakeServer) -> Path:
    return fake.store


def archive(folder: Path, kind: str) -> bytes:
    """The folder as one archive, its files in a folder of their own."""
    packed = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as file:
            for name in (CONFIG, WEIGHTS):
                file.write(folder / name, f"adapter/{name}")
    else:
        with tarfile.open(fileobj=packed, mode="w:gz" if kind == "tar.gz" else "w") as tar:
            tar.add(folder, "adapter")
    return packed.getvalue()


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_archives_are_the_same_adapter(admin: TestClient, drafts: dict[str, Path], kind: str) -> None:
    digest = upload(admin, "files", drafts["qv"]).json()["digest"]
    packed = {"archive": archive(drafts["qv"], kind)}
    answer = admin.post("/v1/adapters", data={"name": "packed"}, files=packed)
    assert answer.status_code == 201, answer.text
    assert answer.json()["digest"] == digest


def test_upload_by_path(admin: TestClient, drafts: dict[str, Path]) -> None:
    answer = admin.post("/v1/adapters", json={"name": "by-path", "path": str(drafts["qv"])})
    assert answer.status_code == 201, answer.text


def test_bad_bodies(admin: TestClient, drafts: dict[str, Path]) -> None:
    both = {file: (drafts["qv"] / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    for data, files in (
        ({}, both),
        ({"name": "x"}, {CONFIG: both[CONFIG]}),
        ({"name": "x"}, {**both, "archive": b"PK"}),
        ({"name": "x"}, {**both, "other": b"1"}),
        ({"name": "x" * 400}, both),
        ({"name": "a/b/c"}, both),
    ):
        answer = admin.post("/v1/adapters", data=data, files=files)
        assert answer.status_code == 400 or answer.status_code == 413, (answer.status_code, answer.text)
        assert answer.json()["error"]["message"]
    hub = admin.post("/v1/adapters", files={"name": (None, "x"), "hub_id": (None, "org/adapter")})
    assert hub.status_code == 403
    header = {"Content-Type": "multipart/form-data; boundary=x"}
    parts = b"".join(
        b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), content)
        for name, content in {"name": b"x", **both}.items()
    )
    for body, told in (
        (b"", "closing boundary"),
        (b"nonsense", "cannot be read"),
        (parts, "closing boundary"),
    ):
        cut = admin.post("/v1/adapters", content=body, headers=header)
        assert cut.status_code == 400 and told in cut.json()["error"]["message"], cut.text
    assert admin.post("/v1/adapters", content=b"x").status_code == 400
    assert admin.post("/v1/adapters", json={"name": "x"}).status_code in (400, 422)
    assert admin.get("/v1/adapters/x").status_code == 404


@pytest.mark.parametrize(("key", "shown"), [(ADMIN_KEY, True), (TENANT_KEYS["acme"], False)])
def test_only_admins_downloads_use_the_servers_hub_token(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, key: str, shown: bool
) -> None:
    """It opens the private repositories of whoever it belongs to."""
    asked: list[tuple[Any, ...]] = []

    def download(hub_id: str, revision: str | None, _: Path, most: int, token: bool) -> None:
        asked.append((hub_id, revision, most, token))
        raise UsageError("no hub here")

    monkeypatch.setattr(uploads, "download", download)
    fake.app.state.safelora_manager.hub = True
    fields = {"name": (None, "acme/x"), "hub_id": (None, "org/adapter"), "revision": (None, "v1")}
    answer = fake.client(key).post("/v1/adapters", files=fields)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "no hub here")
    assert asked == [("org/adapter", "v1", MAX_BYTES, shown)]


def test_too_large_is_413(admin: TestClient) -> None:
    files = {CONFIG: b"{}", WEIGHTS: bytes(MAX_BYTES + 1)}
    answer = admin.post("/v1/adapters", data={"name": "big"}, files=files)
    assert answer.status_code == 413
    assert "1,000,000" in answer.json()["error"]["message"]


def test_refusals_give_every_reason(admin: TestClient, tmp_path: Path) -> None:
    draft = Draft()
    draft.move(Q0, "model.layers.9999.self_attn.q_proj")
    draft.config.update(use_dora=True, lora_alpha="lots")
    answer = upload(admin, "bad", draft.write(tmp_path / "bad"))
    assert answer.status_code == 422
    assert {"dora", "config_type", "no_projector"} <= {
        reason["code"] for reason in answer.json()["error"]["reasons"]
    }
    assert admin.get("/v1/adapters/bad").status_code == 404


def test_policy_of_one_adapter(admin: TestClient, drafts: dict[str, Path], store: Path) -> None:
    upload(admin, "judged", drafts["qv"])

    def put(**body: object) -> Any:
        return admin.put("/v1/adapters/judged/policy", json=body)

    strict = put(policy={"max_relative_norm": 0.5})
    assert strict.status_code == 200, strict.text
    assert strict.json()["policy"]["max_relative_norm"] == 0.5 and not strict.json()["override"]
    assert put(policy={"max_relative_norm": 0.01}).status_code == 422
    assert admin.get("/v1/adapters/judged").json()["policy"]["max_relative_norm"] == 0.5
    assert put(policy={"select": "number", "number": 3}).status_code == 400
    assert put(policy={"select": "number", "number": 3}, override=True).status_code == 400
    assert put(policy={"nonsense": 1}).status_code == 400
    loose = put(policy={"select": "number", "number": 3}, override=True, reason="a trusted author")
    assert loose.status_code == 200
    assert sum(m["decision"] == "projected" for m in loose.json()["modules"]) == 3
    assert (loose.json()["override"], loose.json()["reason"]) == (True, "a trusted author")
    overridden = NameStore(store).get("judged").live.policy
    assert overridden["number"] == 3 and "max_total_norm" not in overridden, "caps that were not named"
    replaced = upload(admin, "judged", drafts["other"], replace=True).json()
    assert {m["decision"] for m in replaced["modules"]} == {"projected"}, "an override is for its content"
    assert replaced["policy"]["max_relative_norm"] == 0.5, "and leaves what holds for the name"
    put(policy={"max_relative_norm": 0.5})
    replaced = upload(admin, "judged", drafts["qv"], replace=True).json()
    assert replaced["policy"]["max_relative_norm"] == 0.5, "a stricter policy is for the name"
    entries = [e for e in AuditLog(store / "audit").read(None, None) if e["adapter"] == "judged"]
    assert [e["action"] for e in entries if e["action"] == "policy"]
    assert any(e.get("reason") == "a trusted author" and e["override"] for e in entries)
    assert any(e["decision"] == "refused" and e["reasons"] == ["relative_norm"] for e in entries)


def test_a_tenant_does_not_bring_a_revoked_override_back(
    fake: FakeServer, admin: TestClient, drafts: dict[str, Path], store: Path
) -> None:
    upload(admin, "acme/own", drafts["qv"])
    put, route = admin.put, "/v1/adapters/acme/own/policy"
    lax = {"policy": {"mode": "report-only"}, "override": True, "reason": "a test of ours"}
    assert put(route, json=lax).json()["policy"]["mode"] == "report-only"
    assert put(route, json={"policy": {}}).json()["policy"]["mode"] == "enforce"
    acme = fake.client(TENANT_KEYS["acme"])
    back = acme.post("/v1/adapters/acme/own/rollback", json={"version": 2})
    assert back.status_code == 200
    assert back.json()["policy"]["mode"] == "enforce" and not back.json()["override"]
    # The gate enforces without an override, whatever is stored: a laxer server would take it from there.
    live = NameStore(store).get("acme/own").live
    assert (live.version, live.policy, live.override) == (4, {}, False)
    back = admin.post("/v1/adapters/acme/own/rollback", json={"version": 2})
    assert back.json()["policy"]["mode"] == "report-only" and back.json()["override"]
    live = NameStore(store).get("acme/own").live
    assert live.policy["mode"] == "report-only" and live.override


def test_delete_frees_everything(
    fake: FakeServer, admin: TestClient, user: TestClient, drafts: dict[str, Path]
) -> None:
    upload(admin, "gone", drafts["qv"])
    (loaded,) = [request for request in fake.engine.loaded if request.lora_name == "gone"]
    assert "gone" in user.get("/v1/models").text
    answer = admin.delete("/v1/adapters/gone")
    assert answer.json() == {"id": "gone", "object": "adapter", "deleted": True}
    assert "gone" not in user.get("/v1/models").text
    assert loaded.lora_int_id in fake.engine.removed
    assert not any(("adapter", "gone") in labels for _, labels in metric_samples(user))
    assert admin.delete("/v1/adapters/gone").status_code == 404
    assert admin.delete("/v1/adapters/static").status_code == 400


def test_tenant_quota(fake: FakeServer, store: Path, tmp_path: Path) -> None:
    for seed in range(4):
        Draft(tensors=lora([Q0], seed=seed)).write(tmp_path / str(seed))
    Draft(lora_config(r=16, lora_alpha=32), lora([Q0], rank=16)).write(tmp_path / "rank")
    acme = fake.client(TENANT_KEYS["acme"])
    over = upload(acme, "acme/rank", tmp_path / "rank")
    assert over.status_code == 403 and "max_rank" in over.json()["error"]["message"]
    *_, entry = AuditLog(store / "audit").read(None, None)
    assert (entry["adapter"], entry["reasons"]) == ("acme/rank", ["quota"])
    for seed in range(3):
        assert upload(acme, f"acme/{seed}", tmp_path / str(seed)).status_code == 201
    over = upload(acme, "acme/3", tmp_path / "3")
    assert over.status_code == 403 and "max_adapters" in over.json()["error"]["message"]
    *_, entry = AuditLog(store / "audit").read(None, None)
    assert (entry["adapter"], entry["decision"], entry["reasons"]) == ("acme/3", "refused", ["quota"])
    assert upload(acme, "acme/2", tmp_path / "3", replace=True).status_code == 201
    assert acme.delete("/v1/adapters/acme/0").status_code == 200
    assert upload(acme, "acme/3", tmp_path / "3").status_code == 201


def test_versions_and_rollback(admin: TestClient, user: TestClient, drafts: dict[str, Path]) -> None:
    first = upload(admin, "swap", drafts["qv"]).json()
    assert upload(admin, "swap", drafts["other"]).status_code == 409
    second = upload(admin, "swap", drafts["other"], replace=True).json()
    assert (second["version"], second["digest"] != first["digest"]) == (2, True)
    back = admin.post("/v1/adapters/swap/rollback", json={"version": 1})
    assert back.status_code == 200 and back.json()["digest"] == first["digest"]
    listed = user.get("/v1/adapters/swap/versions").json()
    assert listed["current"] == 3
    digests = [version["digest"] for version in listed["versions"]]
    assert digests == [first["digest"], second["digest"], first["digest"]]
    assert admin.post("/v1/adapters/swap/rollback", json={"version": 9}).status_code == 400
    assert admin.post("/v1/adapters/nobody/rollback", json={"version": 1}).status_code == 404


def test_the_audit_log_has_no_secrets(admin: TestClient, drafts: dict[str, Path], store: Path) -> None:
    upload(admin, "noted", drafts["qv"])
    admin.delete("/v1/adapters/noted")
    text = (store / "audit" / "audit.jsonl").read_text()
    actions = [e["action"] for e in AuditLog(store / "audit").read(None, None) if e["adapter"] == "noted"]
    assert actions == ["upload", "delete"]
    assert not any(secret in text for secret in (ADMIN_KEY, *TENANT_KEYS.values()))
