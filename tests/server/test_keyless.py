"""A store that tenants have uploaded to, and a server that is started without their keys file."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from safelora_vllm.errors import GuardError
from safelora_vllm.integration import launch
from safelora_vllm.projectors.cache import ProjectorCache
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_server import SECRET, Place
from tests.tiny import Draft


@pytest.fixture
def place(cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    with Place.start(cache, tmp_path) as started:
        started.tenant()
        yield started


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Draft().write(tmp_path / "adapter")


def status_for_anybody(place: Place, **settings: str) -> int:
    with place.server(**settings) as server:
        return server.client().get("/v1/adapters/acme/a").status_code


def test_a_tenants_adapter_does_not_become_everybodys(place: Place, adapter: Path) -> None:
    with place.server(keys=str(place.keys)) as server:
        assert upload(server.client(SECRET), "acme/a", adapter).status_code == 201
        again = server.client(ADMIN_KEY).put("/v1/adapters/acme/a/policy", json={"policy": {"select": "all"}})
        assert again.status_code == 200  # the live version is the admin's now, its content the tenant's
    with pytest.raises(GuardError, match=r"'acme/a'.*--keys"):
        status_for_anybody(place)
    with pytest.raises(GuardError, match=r"'acme/a'.*--keys"):
        launch._check_rules(ProjectorCache(place.gate.settings.projectors), place.gate.settings)
    place.keys.write_text("[admin]\n")
    assert status_for_anybody(place, keys=str(place.keys)) == 404


def test_an_adapter_that_an_admin_gave_a_tenant_does_not_either(place: Place, adapter: Path) -> None:
    with place.server(keys=str(place.keys)) as server:
        assert upload(server.client(ADMIN_KEY), "acme/a", adapter).status_code == 201
    with pytest.raises(GuardError, match=r"'acme/a'.*--keys"):
        status_for_anybody(place)
    with place.server(keys=str(place.keys)) as server:
        assert server.client(ADMIN_KEY).delete("/v1/adapters/acme/a").status_code == 200
        assert upload(server.client(ADMIN_KEY), "shared", adapter).status_code == 201
    assert status_for_anybody(place) == 404  # it starts: what is left is everybody's


def test_a_server_that_runs_without_keys_does_not_take_over_tenants_adapters(
    place: Place, adapter: Path
) -> None:
    with place.server() as keyless, place.server(keys=str(place.keys)) as server:
        admin, anybody = keyless.client(ADMIN_KEY), keyless.client()
        for client, name in ((SECRET, "acme/a"), (ADMIN_KEY, "acme/b"), (ADMIN_KEY, "shared")):
            assert upload(server.client(client), name, adapter).status_code == 201
        assert upload(admin, "own/a", adapter).status_code == 201
        for _ in range(100):
            if anybody.get("/v1/adapters/shared").status_code == 200:
                break
            keyless.portal.call(asyncio.sleep, 0.02)
        names = ("shared", "own/a", "acme/a", "acme/b")
        assert [anybody.get(f"/v1/adapters/{name}").status_code for name in names] == [200, 200, 404, 404]
        for name in names[2:]:
            answer = upload(admin, name, adapter, replace=True)
            assert answer.status_code == 400 and "without a keys file everybody could use it" in answer.text
        assert server.client(SECRET).get("/v1/adapters/acme/a").json()["version"] == 1


@pytest.mark.parametrize("name", ["acme/a", "admin/a"])
def test_a_name_with_a_slash_that_an_admin_gave_is_everybodys(place: Place, adapter: Path, name: str) -> None:
    """As with ``--lora-modules``: a slash alone makes no tenant, also where there were keys once."""
    with place.server(keys=str(place.keys)):
        pass
    with place.server() as server:
        assert upload(server.client(ADMIN_KEY), name, adapter).status_code == 201
    with place.server() as server:
        assert server.client().get(f"/v1/adapters/{name}").status_code == 200
    launch._check_rules(ProjectorCache(place.gate.settings.projectors), replace(place.gate.settings, keys=""))
