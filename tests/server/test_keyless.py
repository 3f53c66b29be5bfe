"""A store that tenants have uploaded to, and a server that is started without their keys file."""

from __future__ import annotations

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


def test_a_name_with_a_slash_that_an_admin_gave_is_everybodys(place: Place, adapter: Path) -> None:
    """As with ``--lora-modules``: a slash alone makes no tenant."""
    with place.server() as server:
        assert upload(server.client(ADMIN_KEY), "acme/a", adapter).status_code == 201
    assert status_for_anybody(place) == 200
    launch._check_rules(ProjectorCache(place.gate.settings.projectors), replace(place.gate.settings, keys=""))
