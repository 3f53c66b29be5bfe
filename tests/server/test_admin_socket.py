"""The admin socket: who may connect, hostile paths, and what is left of it. The engines are fake."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from safelora_vllm.errors import GuardError
from safelora_vllm.integration.server.admin_socket import AdminSocket, by_socket
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store.audit_log import AuditLog
from tests.server.conftest import ADMIN_KEY, INFERENCE_KEY, upload
from tests.server.fake_server import Place


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "admin" / "admin.sock"


@pytest.fixture
def guarded(cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    with Place.start(cache, tmp_path, select="all") as place:
        yield place


def local(path: Path, **headers: str) -> httpx.Client:
    """A caller that has no key."""
    return httpx.Client(
        transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", headers=headers
    )


def serving(place: Place, path: Path, **more: Any) -> Any:
    return place.server(api_key=INFERENCE_KEY, admin_socket=str(path), **more)


def test_a_caller_without_a_key_is_an_admin_over_the_socket_only(
    guarded: Place, path: Path, drafts: dict[str, Path]
) -> None:
    body = {"lora_name": "x", "lora_path": str(drafts["qv"]), "base_model_name": "aligned"}
    with serving(guarded, path) as server, local(path) as syncer:
        assert syncer.get("/health").status_code == 200
        assert syncer.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert "x" in [model["id"] for model in syncer.get("/v1/models").json()["data"]]
        assert server.client().post("/v1/load_lora_adapter", json=body).status_code == 401
        assert server.client().get("/v1/models").status_code == 401
        forged = server.client()
        forged.headers["safelora.admin_socket"] = "true"
        assert forged.get("/v1/models").status_code == 401
        entries = AuditLog(server.store / "audit").read()
        assert [entry["actor"] for entry in entries] == ["admin-socket"]
        refused = syncer.post("/update_weights", json={})
        assert refused.status_code in (403, 404), "what nobody may, it may not"


@pytest.mark.parametrize("key", [f"Bearer {INFERENCE_KEY}", "Bearer wrong", "Basic eDp5"])
def test_a_key_that_is_sent_over_the_socket_counts(guarded: Place, path: Path, key: str) -> None:
    """A proxy in front that passes keys on makes nobody an admin."""
    with serving(guarded, path), local(path, Authorization=key) as keyed:
        assert keyed.get("/v1/usage?tenant=x").status_code == 401
        models = keyed.get("/v1/models").status_code
        assert models == (200 if INFERENCE_KEY in key else 401)
        keyed.headers["Authorization"] = f"Bearer {ADMIN_KEY}"
        assert keyed.get("/v1/usage?tenant=x").status_code == 400, "an admin's question, which is wrong"


def test_two_servers_of_one_parent_are_two(guarded: Place, path: Path, tmp_path: Path) -> None:
    with serving(guarded, path):
        for server in (f"{tmp_path / 'other'} (None, 8000)", f"{guarded.store} (None, 8001)"):
            with pytest.raises(GuardError, match="another server listens there"):
                AdminSocket(path, server)


def test_only_the_servers_user_may_connect(guarded: Place, path: Path) -> None:
    with serving(guarded, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700, "the folder was made"


def test_the_socket_is_there_until_the_end_and_a_stale_one_is_replaced(guarded: Place, path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with serving(guarded, path), local(path) as caller:
        assert caller.get("/v1/adapters").status_code == 200
    assert not path.exists(), "removed at the end"
    with serving(guarded, path), local(path) as caller:
        assert caller.get("/v1/adapters").status_code == 200, "the next server takes the path"


def test_of_two_api_servers_one_listens(
    guarded: Place, path: Path, drafts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(guarded, path), serving(guarded, path) as two, local(path) as caller:
        body = {"lora_name": "x", "lora_path": str(drafts["qv"])}
        assert caller.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert two.client(ADMIN_KEY).get("/v1/adapters/x").status_code == 200, (
            "what it changes holds for both"
        )
        assert not two.app.state.safelora_admin_socket.listens
        monkeypatch.setattr(os, "getppid", lambda: 1)
        with pytest.raises(GuardError, match="another server listens there"), serving(guarded, path):
            pass


@pytest.mark.parametrize("kind", ["world", "group", "folder is a link", "folder is a file", "file", "link"])
def test_a_hostile_path_stops_the_start(guarded: Place, path: Path, tmp_path: Path, kind: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if kind == "folder is a link":
        path.parent.symlink_to(elsewhere)
    elif kind == "folder is a file":
        path.parent.touch()
    else:
        path.parent.mkdir()
        path.parent.chmod({"world": 0o777, "group": 0o770}.get(kind, 0o700))
    if kind == "file":
        path.touch()
    elif kind == "link":
        path.symlink_to(elsewhere / "admin.sock")
    words = {
        "world": "chmod 700", "group": "others may write to", "folder is a link": "no link",
        "folder is a file": "cannot be used", "file": "something else than a socket",
        "link": "something else than a socket",
    }[kind]  # fmt: skip
    with pytest.raises(GuardError, match=words), serving(guarded, path):
        pass
    assert list(elsewhere.iterdir()) == []


def test_what_marks_a_request_cannot_be_sent() -> None:
    assert by_socket({"type": "http"}) is None
    assert by_socket({"type": "http", "safelora.admin_socket": "True"}) is None
    admin = by_socket({"type": "http", "safelora.admin_socket": True})
    assert admin is not None and (admin.kind, admin.tenant) == ("admin", None)


def test_uploads_over_the_socket_pass_the_same_gate(
    guarded: Place, path: Path, drafts: dict[str, Path]
) -> None:
    with serving(guarded, path, max_adapter_bytes=100), local(path) as caller:
        assert upload(caller, "x", drafts["qv"]).status_code == 413
