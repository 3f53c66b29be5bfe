"""What tenants can find out of others by waiting, and by flooding the audit log. The engine is a fake one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from safelora_vllm.errors import Forbidden, UnknownAdapter
from safelora_vllm.store import NameStore
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.tenants.principal import Principal
from tests.server.conftest import upload
from tests.server.fake_server import SECRET, Place
from tests.tiny import Draft

STRANGER = Principal("tenant", "globex/ci", "globex")
ACME = Principal("tenant", "acme/ci", "acme")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Draft().write(tmp_path / "adapter")


def test_a_name_of_another_tenant_takes_the_path_of_one_that_nobody_has(
    place: Place, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither waits for a change that runs, nor reads the name's record."""
    asked: list[str] = []

    async def use() -> None:
        async with place.manager() as (manager, _):
            await manager.add(ACME, "acme/x", adapter)
            real = NameStore.get

            def get(self: NameStore, name: str) -> object:
                asked.append(name)
                return real(self, name)

            monkeypatch.setattr(NameStore, "get", get)
            calls: list[Callable[[str], Awaitable[object]]] = [
                lambda name: manager.roll_back(STRANGER, name, 1),
                lambda name: manager.remove(STRANGER, name),
                lambda name: manager.remove_version(STRANGER, name, 1),
                lambda name: manager.set_policy(STRANGER, name, {}, False, ""),
                lambda name: manager.add(STRANGER, name, adapter, replace=True),
            ]
            lock = asyncio.Lock()
            manager._commits._locks["acme/x"] = lock
            async with lock:  # a change of it runs, for as long as it may take
                for call in calls:
                    answers = []
                    for name in ("acme/x", "acme/none", "nobody/x"):
                        with pytest.raises((UnknownAdapter, Forbidden)) as refused:
                            await asyncio.wait_for(call(name), 5)
                        answers.append((type(refused.value), str(refused.value).replace(name, "NAME")))
                    assert answers[0] == answers[1] == answers[2]
                waiting = asyncio.create_task(manager.roll_back(ACME, "acme/x", 1))
                await asyncio.sleep(0.05)
                assert not waiting.done(), "who may use it waits"
            await waiting

    asyncio.run(use())
    assert set(asked) == {"acme/x"} and len(asked) <= 2, "for the owner's own call"


def test_repeated_quota_refusals_are_counted_and_none_is_lost(
    place: Place, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    place.tenant(max_adapters=0)
    with place.server(keys=str(place.keys)) as server:
        http = server.client(SECRET)
        for number in range(13):
            assert upload(http, f"acme/{number}", adapter).status_code == 403
        assert len(http.get("/v1/usage").json()["refusals"]) == 10
    lines = list(AuditLog(place.store / "audit").read())
    assert [line.get("count", 1) for line in lines] == [1] * 10 + [3]
    assert {(line["actor"], line["decision"], *line["reasons"]) for line in lines} == {
        ("acme/ci", "refused", "quota")
    }


def test_an_admin_has_no_quota_and_the_tenant_is_told_of_its_own(place: Place, adapter: Path) -> None:
    who = place.tenant(max_adapters=1)

    async def use() -> None:
        async with place.manager() as (manager, _):
            await manager.add(who, "acme/x", adapter)
            await manager.add(replace(who, kind="admin", tenant=None), "acme/y", adapter)

    asyncio.run(use())
    assert set(NameStore(place.store).all()) == {"acme/x", "acme/y"}
