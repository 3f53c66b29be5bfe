"""Signed uploads over HTTP: each way to send one, who is asked for it, and what is kept of it."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

pytest.importorskip("cryptography", reason="the extra `signing`")

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import NameStore
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.store.statement import decision
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_server import FakeServer, Place
from tests.signing import identity, new_key, public_pem, sign_folder
from tests.tiny import Draft, lora

KEY, OTHER = new_key(), new_key()
SIGNER = identity(public_pem(KEY))
SECRETS = {name: f"the long secret of {name}" for name in ("must", "may", "free")}


def keys(must: str = "require_signature = true") -> str:
    own = f'signing_keys = ["""{public_pem(KEY)}"""]\n'
    rules = {"must": f"{own}{must}\n", "may": own, "free": ""}
    return "".join(
        f'[tenants.{name}]\n{rule}[tenants.{name}.keys]\nci = "{SECRETS[name]}"\n'
        for name, rule in rules.items()
    )


@pytest.fixture
def place(cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    with Place.start(cache, tmp_path, select="all") as place:
        place.keys.touch(0o600)
        place.keys.write_text(keys())
        yield place


@pytest.fixture
def api(place: Place, tmp_path: Path) -> Iterator[FakeServer]:
    with place.server(keys=str(place.keys), adapter_roots=[str(tmp_path)]) as started:
        yield started


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return Draft(tensors=lora(seed=1)).write(tmp_path / "plain")


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    return sign_folder(Draft(tensors=lora(seed=1)).write(tmp_path / "signed"), KEY)


def send(http: TestClient, name: str, folder: Path, **query: str) -> Any:
    """All files of a folder as parts."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return http.post("/v1/adapters", params=query, data={"name": name}, files=files)


def packed(folder: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        archive.add(folder, "adapter")
    return stream.getvalue()


def test_each_way_to_send_a_signature(api: FakeServer, place: Place, signed: Path) -> None:
    tenant, admin = api.client(SECRETS["must"]), api.client(ADMIN_KEY)
    (signed / "README.md").write_text("x")
    alone = signed.parent / "alone"
    sign_folder(Draft(tensors=lora(seed=1)).write(alone), KEY)
    sign_folder(signed, KEY)
    answers = [
        send(tenant, "must/files", alone),
        tenant.post("/v1/adapters", data={"name": "must/archive"}, files={"archive": packed(signed)}),
        admin.post("/v1/adapters", json={"name": "must/path", "path": str(signed)}),
    ]
    for answer in answers:
        assert answer.status_code == 201, answer.text
        assert (answer.json()["signed"], answer.json()["signed_by"]) == (True, SIGNER)
    load = admin.post("/v1/load_lora_adapter", json={"lora_name": "must/vllm", "lora_path": str(signed)})
    assert load.status_code == 200, load.text
    for name in ("files", "archive", "path", "vllm"):
        assert tenant.get(f"/v1/adapters/must/{name}").json()["signed_by"] == SIGNER
        (version,) = tenant.get(f"/v1/adapters/must/{name}/versions").json()["versions"]
        assert version["signed_by"] == SIGNER
    records = list(AuditLog(place.store / "audit").read())
    assert {record["signed_by"] for record in records} == {SIGNER} and len(records) == 4
    assert not list(place.store.rglob("model.sig")), "what the store keeps is what the gate read"


def test_who_is_asked_for_a_signature(api: FakeServer, place: Place, plain: Path, signed: Path) -> None:
    clients = {name: api.client(secret) for name, secret in SECRETS.items()}
    refused = upload(clients["must"], "must/x", plain)
    assert refused.status_code == 422 and "[signature] the upload has no model.sig" in refused.text
    assert upload(api.client(ADMIN_KEY), "must/x", plain).status_code == 422, "nor may an admin"
    for name in ("may", "free"):
        answer = upload(clients[name], f"{name}/x", plain)
        assert (answer.status_code, answer.json()["signed"], answer.json()["signed_by"]) == (201, False, "")
    assert send(clients["free"], "free/y", signed).json()["signed"] is False, "without keys it is ignored"
    sign_folder(plain, OTHER)
    for name in ("must", "may"):
        wrong = send(clients[name], f"{name}/z", plain)
        assert wrong.status_code == 422 and identity(public_pem(OTHER)) in wrong.text
    assert send(clients["free"], "free/z", plain).status_code == 201
    assert send(api.client(ADMIN_KEY), "shared", plain).json()["signed"] is False, "no tenant, no keys"
    refusals = [r for r in AuditLog(place.store / "audit").read() if r["decision"] == "refused"]
    assert len(refusals) == 4 and all(r["reasons"] == ["signature"] for r in refusals)
    assert all("signed_by" not in r for r in refusals)


def test_a_signature_stays_with_its_version(api: FakeServer, place: Place, plain: Path, signed: Path) -> None:
    """Through the same content again, a policy, a rollback, and a restart."""
    tenant, admin = api.client(SECRETS["may"]), api.client(ADMIN_KEY)
    assert upload(tenant, "may/x", plain).json()["signed"] is False
    answer = send(tenant, "may/x", signed, replace="true").json()
    assert (answer["version"], answer["signed_by"]) == (2, SIGNER), "a signature of the same content is news"
    answer = upload(tenant, "may/x", plain, replace=True).json()
    assert (answer["version"], answer["signed_by"]) == (2, SIGNER), "to leave it out is not"
    values = {"policy": {"mode": "report-only"}, "override": True, "reason": "a test"}
    answer = admin.put("/v1/adapters/may/x/policy", json=values)
    assert (answer.status_code, answer.json()["signed_by"]) == (200, SIGNER), answer.text
    answer = tenant.post("/v1/adapters/may/x/rollback", json={"version": 1}).json()
    assert (answer["version"], answer["signed_by"]) == (4, "")
    answer = tenant.post("/v1/adapters/may/x/rollback", json={"version": 2}).json()
    assert (answer["version"], answer["signed_by"]) == (5, SIGNER)
    with place.server(keys=str(place.keys)) as again:
        assert again.client(SECRETS["may"]).get("/v1/adapters/may/x").json()["signed_by"] == SIGNER


def test_no_rollback_to_what_is_not_signed(api: FakeServer, place: Place, plain: Path, signed: Path) -> None:
    place.keys.write_text(keys("require_signature = false"))
    tenant = api.client(SECRETS["must"])
    assert upload(tenant, "must/x", plain).status_code == 201
    assert send(tenant, "must/x", signed, replace="true").json()["signed_by"] == SIGNER
    place.keys.write_text(keys())
    refused = tenant.post("/v1/adapters/must/x/rollback", json={"version": 1})
    assert refused.status_code == 422 and "version 1 of must/x is not signed" in refused.text
    assert tenant.get("/v1/adapters/must/x").json()["version"] == 2
    assert tenant.post("/v1/adapters/must/x/rollback", json={"version": 2}).status_code == 200
    last = list(AuditLog(place.store / "audit").read())[-2]
    assert (last["action"], last["decision"], last["reasons"]) == ("rollback", "refused", ["signature"])
    record = NameStore(place.store).get("must/x")
    assert record is not None and [v.signed_by for v in record.versions] == ["", SIGNER, SIGNER]


def test_bodies_with_a_signature_that_are_none(api: FakeServer, signed: Path) -> None:
    tenant = api.client(SECRETS["must"])
    both = {name: (signed / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    signature = (signed / "model.sig").read_bytes()
    for files in ({"model.sig": signature}, {"archive": b"PK", "model.sig": signature}):
        assert tenant.post("/v1/adapters", data={"name": "must/x"}, files=files).status_code == 400
    files = {**both, "model.sig": bytes(1024 * 1024 + 1)}
    assert tenant.post("/v1/adapters", data={"name": "must/x"}, files=files).status_code == 413


def test_an_unsigned_attempt_changes_no_statement(
    api: FakeServer, place: Place, plain: Path, signed: Path, tmp_path: Path
) -> None:
    """The newest decision is a refusal then, and what is served is as before."""
    other = sign_folder(Draft(tensors=lora(seed=2)).write(tmp_path / "other"), KEY)
    tenant, admin = api.client(SECRETS["must"]), api.client(ADMIN_KEY)
    assert send(tenant, "must/x", signed).status_code == 201
    assert upload(tenant, "must/x", plain, replace=True).status_code == 422
    served = decision(place.store, "must/x")
    assert (served["decision"], served["version"], served["signed_by"]) == ("accepted", 1, SIGNER)
    assert decision(place.store, "must/x", digest=served["digest"])["decision"] == "refused"
    assert (
        admin.put("/v1/adapters/must/x/policy", json={"policy": {"max_total_norm": 0.9}}).status_code == 200
    )
    assert decision(place.store, "must/x")["policy"]["max_total_norm"] == 0.9
    assert send(tenant, "must/x", other, replace="true").status_code == 201
    assert decision(place.store, "must/x", version=1)["digest"] == served["digest"]
    assert tenant.post("/v1/adapters/must/x/rollback", json={"version": 1}).status_code == 200
    now = decision(place.store, "must/x")
    assert (now["action"], now["digest"]) == ("rollback", served["digest"])
    live = NameStore(place.store).all()["must/x"].live
    assert (now["version"], now["published"]) == (live.version, live.key)


def test_what_is_served_already_needs_its_signature_too(api: FakeServer, signed: Path, place: Place) -> None:
    """vLLM's own call, which controllers repeat, is answered all the same; the log says what it was."""
    admin, folder = api.client(ADMIN_KEY), signed.parent / "unsigned"
    assert send(api.client(SECRETS["must"]), "must/x", signed).status_code == 201
    Draft(tensors=lora(seed=1)).write(folder)
    again = upload(api.client(SECRETS["must"]), "must/x", folder)
    assert again.status_code == 422 and "[signature]" in again.text
    loads = {"lora_name": "must/x", "lora_path": str(folder)}
    assert admin.post("/v1/load_lora_adapter", json=loads).status_code == 200
    told = [(line["action"], line["decision"]) for line in AuditLog(place.store / "audit").read()]
    assert told == [("upload", "accepted"), ("upload", "refused"), ("load", "refused")]
