"""A server whose projector cache has neither Ĉ nor V, and policies of adapters that read one of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import NameStore
from tests.server.conftest import ADMIN_KEY, TENANT_KEYS, upload, write_keys
from tests.server.fake_server import Place

ROUTE = "/v1/adapters/acme/own"
OVERRIDE = {"policy": {"method": "safe-lora"}, "override": True, "reason": "a hostile author"}


@contextmanager
def serving(cache: ProjectorCache, folder: Path) -> Iterator[tuple[TestClient, TestClient]]:
    """An admin and a tenant of a server with that cache, on one store for all caches."""
    (folder / "gate.sock").unlink(missing_ok=True)  # of the server before
    with (
        Place.start(cache, folder, method="input-removal") as place,
        place.server(keys=str(write_keys(place.keys))) as server,
    ):
        yield server.client(ADMIN_KEY), server.client(TENANT_KEYS["acme"])


def settled(client: TestClient, path: str) -> Any:
    """The answer when the gate was asked for the copy."""
    deadline = time.monotonic() + 30
    while (answer := client.get(path)).status_code == 503 and time.monotonic() < deadline:
        time.sleep(0.02)
    return answer


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)


def test_an_admins_policy_that_reads_an_operator_works_without_one(
    thin: ProjectorCache, drafts: dict[str, Path], tmp_path: Path
) -> None:
    with serving(thin, tmp_path) as (admin, acme):
        assert upload(acme, "acme/own", drafts["qv"]).status_code == 201
        for policy in ({"method": "safe-lora"}, {"select": "number", "number": 3}):
            answer = admin.put(f"{ROUTE}/policy", json={**OVERRIDE, "policy": policy})
            assert answer.status_code == 200, answer.text
            report = acme.get(ROUTE).json()
            assert policy.items() <= report["policy"].items()
            assert all(module["similarity_error"] > 0 for module in report["modules"])
            marked = {module["decision"] for module in report["modules"] if module["uncertain"]}
            assert marked <= {"projected"}


def test_one_that_was_set_before_holds_when_the_cache_changes(
    cache: ProjectorCache, thin: ProjectorCache, drafts: dict[str, Path], tmp_path: Path
) -> None:
    """The server changes to a thin cache and back. With the thin one no fewer modules are projected."""
    with serving(cache, tmp_path) as (admin, acme):
        for name in ("acme/own", "acme/other"):
            assert upload(acme, name, drafts["qv"]).status_code == 201
        assert admin.put(f"{ROUTE}/policy", json=OVERRIDE).status_code == 200
        exact = projected(acme.get(ROUTE).json())
    record = NameStore(tmp_path / "store").get("acme/own")
    with serving(thin, tmp_path) as (_, acme):
        answer = settled(acme, ROUTE).json()
        assert answer["policy"]["method"] == "safe-lora" and exact <= projected(answer)
        assert settled(acme, "/v1/adapters/acme/other").json()["policy"]["method"] == "input-removal"
        now = NameStore(tmp_path / "store").get("acme/own")
        assert record and now and now.current == record.current
        for kept in ("digest", "policy", "override", "base_policy", "reason"):
            assert getattr(now.live, kept) == getattr(record.live, kept)
    with serving(cache, tmp_path) as (_, acme):
        assert projected(settled(acme, ROUTE).json()) == exact
    with serving(thin, tmp_path) as (_, acme):  # an override is for its content
        assert upload(acme, "acme/own", drafts["other"], replace=True).status_code == 201
        assert acme.get(ROUTE).json()["policy"]["method"] == "input-removal"


def projected(report: Any) -> set[str]:
    """The modules that are."""
    return {module["name"] for module in report["modules"] if module["decision"] == "projected"}
