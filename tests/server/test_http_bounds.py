"""What bounds a request of ours: its size, its time, its fields, its slots. The engine is a fake one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError

from safelora_vllm.errors import GateUnavailable, GuardError, StoreUnavailable
from safelora_vllm.integration.server import adapter_series, loading_routes, middleware, route_parts, uploads
from safelora_vllm.integration.server.schemas import (
    LoadRequest,
    PolicyChange,
    Rollback,
    UploadByPath,
    VersionInfo,
    version_info,
)
from safelora_vllm.integration.server.uploads import TooManyUploads, UploadTimeout
from safelora_vllm.store import Version
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.tenants.principal import Principal
from tests.server.conftest import ADMIN_KEY, TENANT_KEYS, load, metric_samples, upload
from tests.server.fake_server import FakeServer

KIB_64 = 64 * 1024
BODIES = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters/x/rollback")


@pytest.fixture
def admin(fake: FakeServer) -> TestClient:
    return fake.client(ADMIN_KEY)


def test_what_is_received_is_bounded() -> None:
    """As SECURITY.md and the errors say it."""
    assert route_parts._MAX_JSON == middleware._MAX_BODY == KIB_64
    assert uploads._FIELDS == {"name": 300, "hub_id": 300, "revision": 200}
    assert uploads._CONFIG_BYTES == uploads._OVERHEAD_BYTES == uploads._BLOCK == 1024**2
    assert (uploads._PATIENCE_SECONDS, uploads._PATIENCE_BYTES) == (60.0, KIB_64)


def padded(size: int) -> bytes:
    """The body of a removal, with this many bytes."""
    body = json.dumps({"lora_name": "nobody", "more": ""}).encode()
    return body.replace(b'""', b'"' + b"x" * (size - len(body)) + b'"')


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
def test_a_json_body_has_64_kib_and_not_one_byte_more(admin: TestClient, kind: str) -> None:
    def status(path: str, size: int, method: str = "POST") -> int:
        headers = {"Content-Type": kind}
        return admin.request(method, path, content=padded(size), headers=headers).status_code

    for path in BODIES:
        assert status(path, KIB_64) in (400, 404, 422), path
        assert status(path, KIB_64 + 1) == 413, path
    assert status("/v1/adapters/x/policy", KIB_64 + 1, "PUT") == 413
    if kind == "application/json":
        assert status("/v1/adapters", KIB_64) in (400, 422)
        assert status("/v1/adapters", KIB_64 + 1) == 413


def test_a_json_body_that_does_not_say_its_length_ends_at_the_same_bound(admin: TestClient) -> None:
    def status(size: int) -> int:
        return admin.post(
            "/v1/unload_lora_adapter",
            content=iter([padded(size)]),
            headers={"Content-Type": "application/json"},
        ).status_code

    assert status(KIB_64) == 404
    assert status(KIB_64 + 1) in (400, 413)


def test_a_path_upload_that_drips_is_ended(admin: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def drips(_: object) -> Any:
        yield b"{"
        raise UploadTimeout("too slow")

    monkeypatch.setattr(loading_routes, "read_with_timeout", drips)
    assert admin.post("/v1/adapters", json={"name": "x", "path": "/x"}).status_code == 408


class Slots:
    """Notes who holds one, and may have none."""

    def __init__(self) -> None:
        self.taken: list[str | None] = []
        self.free = True

    @contextmanager
    def take(self, tenant: str | None) -> Iterator[None]:
        self.taken.append(tenant)
        if not self.free:
            raise TooManyUploads("too many uploads are running")
        yield


def test_uploads_and_rollbacks_hold_a_slot_of_their_tenant(
    fake: FakeServer, admin: TestClient, drafts: dict[str, Path]
) -> None:
    fake.app.state.safelora_upload_limiter = slots = Slots()
    acme = fake.client(TENANT_KEYS["acme"])
    rollback = "/v1/adapters/acme/x/rollback"
    assert upload(acme, "acme/x", drafts["qv"]).status_code == 201
    assert acme.post(rollback, json={"version": 1}).status_code == 200
    assert admin.post("/v1/adapters", json={"name": "y", "path": str(drafts["qv"])}).status_code == 201
    assert slots.taken == ["acme", "acme", None]
    slots.free = False
    for answer in (upload(acme, "acme/x", drafts["qv"]), acme.post(rollback, json={"version": 1})):
        assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"


def test_paths_are_for_admins_and_for_servers_with_roots(
    fake: FakeServer, admin: TestClient, drafts: dict[str, Path]
) -> None:
    body = {"name": "acme/x", "path": str(drafts["qv"])}
    assert fake.client(TENANT_KEYS["acme"]).post("/v1/adapters", json=body).status_code == 403
    assert admin.post("/v1/adapters", json=body).status_code == 201
    fake.app.state.safelora_manager.roots = ()
    answer = admin.post("/v1/adapters", json=body)
    assert answer.status_code == 403 and "--adapter-root" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("allowed", "files"), [(False, {}), (True, {"archive": b"PK"})])
def test_the_hub_is_asked_only_where_that_is_allowed_and_nothing_else_is_sent(
    fake: FakeServer,
    admin: TestClient,
    allowed: bool,
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(uploads, "download", lambda *_: pytest.fail("the hub is asked"))
    fake.app.state.safelora_manager.hub = allowed
    fields: Any = {"name": (None, "x"), "hub_id": (None, "org/adapter"), **files}
    answer = admin.post("/v1/adapters", files=fields)
    assert answer.status_code == 403 and "--allow-hub" in answer.json()["error"]["message"]


@pytest.mark.parametrize("body", [{"name": "x", "token": "a secret"}, {"name": ["a secret"], "path": "/x"}])
def test_what_was_sent_is_not_repeated_in_the_error(
    body: dict[str, Any], fake: FakeServer, admin: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a key in the wrong place. FastAPI's own handler would show it, vLLM's does not."""

    async def sent(_: object) -> Any:
        yield json.dumps(body).encode()

    monkeypatch.setattr(loading_routes, "read_with_timeout", sent)
    who, nothing = Principal("admin", "ops"), cast(Any, None)
    with pytest.raises(RequestValidationError) as refused:
        asyncio.run(loading_routes._add_named(who, fake.app.state.safelora_manager, nothing, nothing, False))
    assert refused.value.errors() and "a secret" not in repr(refused.value.errors())
    answer = admin.post("/v1/adapters", json=body)
    assert answer.status_code == 400 and "a secret" not in answer.text


def test_vllms_own_routes_have_actions_of_their_own_in_the_audit_log(
    fake: FakeServer, admin: TestClient, drafts: dict[str, Path]
) -> None:
    assert load(admin, "x", drafts["qv"]).text == "Success: LoRA adapter 'x' added successfully."
    answer = admin.post("/v1/unload_lora_adapter", json={"lora_name": "x"})
    assert answer.text == "Success: LoRA adapter 'x' removed successfully."
    assert answer.headers["content-type"].startswith("text/plain")
    of_x = [entry for entry in AuditLog(fake.store / "audit").read() if entry["adapter"] == "x"]
    assert [entry["action"] for entry in of_x] == ["load", "unload"]


def test_a_name_of_the_command_line_is_not_changed(
    fake: FakeServer, admin: TestClient, drafts: dict[str, Path]
) -> None:
    before = admin.get("/v1/adapters/static").json()
    assert upload(admin, "static", drafts["qv"], replace=True).status_code == 409
    assert load(admin, "static", drafts["qv"], load_inplace=True).status_code == 400
    assert admin.delete("/v1/adapters/static").status_code == 400
    assert admin.get("/v1/adapters/static").json() == before and before["version"] is None
    acme = fake.client(TENANT_KEYS["acme"])
    assert acme.delete("/v1/adapters/static").status_code in (403, 404)


def test_versions_of_other_tenants_are_not_there(
    fake: FakeServer, admin: TestClient, drafts: dict[str, Path]
) -> None:
    assert upload(admin, "acme/x", drafts["qv"]).status_code == 201
    for who, status in (("acme", 200), ("globex", 404)):
        http = fake.client(TENANT_KEYS[who])
        assert http.get("/v1/adapters/acme/x/versions").status_code == status
        assert http.get("/v1/adapters/acme/x").status_code == status


def test_what_cannot_be_served_now_is_not_listed(
    fake: FakeServer, admin: TestClient, drafts: dict[str, Path]
) -> None:
    assert upload(admin, "x", drafts["qv"]).status_code == 201
    registry = fake.app.state.safelora.registry
    registry["x"] = replace(registry["x"], served=None, problem=StoreUnavailable("damaged"))
    listed = admin.get("/v1/adapters")
    assert listed.status_code == 200
    assert [report["adapter"] for report in listed.json()["data"]] == ["static"]
    answer = admin.get("/v1/adapters/x")
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "2"


def test_metrics_are_there_while_the_gate_is_down(
    fake: FakeServer, admin: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer = admin.get("/metrics")
    assert answer.headers["content-type"] == CONTENT_TYPE_LATEST
    ours = [
        path
        for path, methods in admin.get("/openapi.json").json()["paths"].items()
        if any("safelora" in operation.get("tags", ()) for operation in methods.values())
    ]
    assert ours and all(path.startswith(("/v1/", "/safelora/")) for path in ours)
    samples = metric_samples(admin)
    assert samples["safelora_adapters", frozenset()] == 1
    assert samples["safelora_enforcing", frozenset()] == 1, "the gate's own"
    asked: list[float] = []

    def down(timeout: float) -> str:
        asked.append(timeout)
        raise GateUnavailable("nobody listens")

    monkeypatch.setattr(fake.app.state.safelora.copies.gate, "metrics", down)
    samples = metric_samples(admin)
    assert samples["safelora_adapters", frozenset()] == 1
    assert ("safelora_enforcing", frozenset()) not in samples
    assert asked == [5.0], "a scrape has ten seconds by default"
    assert "no gate metrics: nobody listens" in caplog.text
    assert adapter_series.MAX_ADAPTER_SERIES == 500


def test_a_request_that_came_past_the_check_is_not_answered() -> None:
    with pytest.raises(GuardError, match="came past the middleware"):
        route_parts.identified()


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (UploadByPath, {"name": "x" * 300, "path": "p"}, [{"name": "x" * 301}, {"more": 1}, {"path": 5}]),
        (Rollback, {"version": 1}, [{"version": 0}, {"version": "1"}, {"version": 1.0}, {"more": 1}]),
        (Rollback, {"version": 2**53}, [{"version": 2**53 + 1}]),
        (
            PolicyChange,
            {"policy": {}, "override": True, "reason": "x" * 1000},
            [{"override": "true"}, {"override": 1}, {"reason": "x" * 1001}, {"more": 1}, {"policy": []}],
        ),
    ],
)
def test_bodies_have_these_fields_and_no_others(schema: Any, good: dict[str, Any], bad: list[Any]) -> None:
    schema.model_validate_json(json.dumps(good))
    for change in bad:
        with pytest.raises(ValidationError):
            schema.model_validate_json(json.dumps({**good, **change}))


def test_what_a_body_that_does_not_say_means() -> None:
    change = PolicyChange(policy={})
    assert (change.override, change.reason) == (False, "")
    assert LoadRequest(lora_name="x", lora_path="y").load_inplace is False


def test_a_version_is_shown_as_it_is_stored() -> None:
    version = Version(
        3, "d" * 64, 5, 7, 9.5, "ops", {"mode": "enforce"}, True, {}, "because", "k", "r", 16, 2.0
    )
    shown = VersionInfo(**version_info(version)).model_dump()
    assert shown == {
        "version": 3, "digest": "d" * 64, "bytes": 5, "rank": 7, "created": 9.5, "by": "ops",
        "policy": {"mode": "enforce"}, "override": True, "reason": "because", "refused": [],
        "exam_override": False, "signed_by": "",
    }  # fmt: skip
