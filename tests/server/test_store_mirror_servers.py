"""Two API servers on two disks with one bucket: uploads beside requests at both, and what each serves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from safelora_vllm.integration.server import reconcile, store_sync
from safelora_vllm.projectors.cache import ProjectorCache
from tests.moto_server import CREDENTIALS, s3
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_server import FakeServer, Place
from tests.tiny import Draft, lora

UPLOADS = 50


@pytest.fixture
def look_seconds() -> float:
    """Between two looks into the bucket."""
    return 2.0


@pytest.fixture
def servers(
    cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look_seconds: float
) -> Iterator[tuple[FakeServer, FakeServer]]:
    monkeypatch.setattr(reconcile, "_HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(store_sync, "_LOOK_SECONDS", look_seconds)
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with s3() as (endpoint, _):
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": "true"}.items():
            monkeypatch.setenv(name, value)
        with (
            Place.start(cache, tmp_path / "one") as first, Place.start(cache, tmp_path / "two") as second,
            first.server(store_mirror="s3://bucket/x") as one,
            second.server(store_mirror="s3://bucket/x") as two,
        ):  # fmt: skip
            yield one, two


def listed(server: FakeServer) -> dict[str, str]:
    data = server.client(ADMIN_KEY).get("/v1/adapters").json()["data"]
    return {adapter["adapter"]: adapter["digest"] for adapter in data}


def until_same(servers: tuple[FakeServer, FakeServer], count: int) -> dict[str, str]:
    for _ in range(300):
        found = [listed(server) for server in servers]
        if found[0] == found[1] and len(found[0]) == count:
            return found[0]
        time.sleep(0.1)
    raise AssertionError([sorted(names) for names in found])


def test_two_servers_on_one_bucket(servers: tuple[FakeServer, FakeServer], tmp_path: Path) -> None:
    drafts = [Draft(tensors=lora(seed=seed)).write(tmp_path / f"adapter{seed}") for seed in range(5)]

    def one(number: int) -> int:
        http = servers[number % 2].client(ADMIN_KEY)
        status = upload(http, f"n{number}", drafts[number % 5]).status_code
        assert http.get("/v1/models").status_code == 200
        return status

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(UPLOADS))) == [201] * UPLOADS
    names = until_same(servers, UPLOADS)
    assert len(set(names.values())) == 5
    first, second = (server.client(ADMIN_KEY) for server in servers)
    # A name of the other server's: taken, replaced, removed.
    assert upload(second, "n0", drafts[1]).status_code == 409
    assert upload(second, "n0", drafts[1], replace=True).status_code == 201
    assert first.delete("/v1/adapters/n2").status_code == 200
    names = until_same(servers, UPLOADS - 1)
    assert names["n0"] == names["n1"] and "n2" not in names


@pytest.mark.parametrize("look_seconds", [3600.0])
def test_a_change_does_not_wait_for_the_next_look(
    servers: tuple[FakeServer, FakeServer], tmp_path: Path
) -> None:
    """A load balancer may send each change of a name to another server."""
    drafts = [Draft(tensors=lora(seed=seed)).write(tmp_path / f"adapter{seed}") for seed in range(3)]
    first, second = (server.client(ADMIN_KEY) for server in servers)
    assert upload(first, "a", drafts[0]).status_code == 201
    assert upload(second, "a", drafts[1]).status_code == 409
    assert upload(second, "a", drafts[1], replace=True).status_code == 201
    assert upload(first, "a", drafts[2], replace=True).status_code == 201
    assert second.post("/v1/adapters/a/rollback", json={"version": 1}).status_code == 200
    assert upload(second, "b", drafts[0]).status_code == 201
    assert upload(first, "b", drafts[0]).json()["version"] == 1, "the same content is no new version"
    for name in "ab":
        assert first.delete(f"/v1/adapters/{name}").status_code == 200
        assert second.delete(f"/v1/adapters/{name}").status_code == 404
    assert upload(second, "a", drafts[0]).status_code == 201
