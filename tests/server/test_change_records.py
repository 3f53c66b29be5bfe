"""What a change leaves behind in the store and in the audit log, and nothing where it fails.

With the real gate, stores and audit log; the engine is a fake one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
from vllm.lora.request import LoRARequest

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.errors import (
    AdapterRefused,
    EngineUnavailable,
    GateUnavailable,
    PolicyError,
    StoreUnavailable,
)
from safelora_vllm.integration.server.engine import IDS_EACH
from safelora_vllm.integration.server.views import Views
from safelora_vllm.policy import Policy
from safelora_vllm.store import Version
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.tenants.principal import Principal
from tests.server.fake_server import Place
from tests.tiny import K0, Q0, Draft, lora, lora_config

ADMIN = Principal("admin", "admin/ops")
JUDGED = {"digest", "projectors", "policy", "reasons", "release", "ruleset"}
ALWAYS = {"time", "actor", "action", "adapter", "decision"}


def entries(place: Place) -> list[dict[str, Any]]:
    return list(AuditLog(place.store / "audit").read())


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """The first has a module of rank 4 and one of rank 2."""
    config = lora_config(rank_pattern={"k_proj": 2}, target_modules=["q_proj", "k_proj"])
    tensors = {**lora([Q0], rank=4), **lora([K0], rank=2)}
    return [
        Draft(config, tensors).write(tmp_path / "mixed"),
        Draft(tensors=lora(seed=1)).write(tmp_path / "other"),
    ]


def test_the_version_of_each_change(place: Place, adapters: list[Path]) -> None:
    tenant, began = place.tenant(), time.time()

    async def use() -> tuple[Version, ...]:
        async with place.manager() as (manager, _):
            await manager.add(tenant, "acme/x", adapters[0])
            await manager.add(ADMIN, "acme/x", adapters[1], replace=True)
            await manager.roll_back(tenant, "acme/x", 1)
            return (await Views(manager.reconciler).versions(tenant, "acme/x")).versions

    async def load_seconds() -> float:
        async with place.manager() as (manager, _):  # after a restart, or another API server
            return manager.reconciler.registry["acme/x"].load_seconds

    versions = asyncio.run(use())
    first, second, third = versions
    assert asyncio.run(load_seconds()) == third.load_seconds
    assert [version.version for version in versions] == [1, 2, 3]
    sent = sum((adapters[0] / name).stat().st_size for name in (CONFIG, WEIGHTS))
    assert first.bytes == third.bytes > sent, "as if each module had the largest rank, after a rollback too"
    assert [version.rank for version in versions] == [4, 4, 4], "of the module with the largest"
    assert [version.by for version in versions] == [tenant.key_id, ADMIN.key_id, tenant.key_id]
    assert [version.reason for version in versions] == ["", "", "rollback to version 1"]
    assert first.digest == third.digest != second.digest and first.key == third.key != second.key
    assert {version.ruleset_digest for version in versions} == {place.service.state().ruleset_digest}
    assert all(began <= version.created <= time.time() for version in versions)
    assert all(0 < version.load_seconds < time.time() - began for version in versions)
    assert len({version.id // IDS_EACH for version in versions}) == 3, "each has ids of its own"


def test_the_record_of_each_change(place: Place, adapters: list[Path]) -> None:
    tenant = place.tenant()

    async def use() -> None:
        async with place.manager() as (manager, _):
            await manager.add(tenant, "acme/x", adapters[0])
            await manager.set_policy(ADMIN, "acme/x", {"mode": "report-only"}, True, "a test of ours")
            await manager.roll_back(tenant, "acme/x", 1)
            with pytest.raises(AdapterRefused):
                await manager.set_policy(ADMIN, "acme/x", {"max_relative_norm": 1e-6}, False, "")
            await manager.remove(tenant, "acme/x")
            await manager.add(ADMIN, "acme/x", adapters[0], action="load")
            await manager.remove(ADMIN, "acme/x", action="unload")

    asyncio.run(use())
    upload, policy, rollback, refused, removed, load, unload = found = entries(place)
    assert [entry["action"] for entry in found] == [
        "upload", "policy", "rollback", "policy", "delete", "load", "unload",
    ]  # fmt: skip
    assert [entry["actor"] for entry in found] == [
        tenant.key_id, ADMIN.key_id, tenant.key_id, ADMIN.key_id, tenant.key_id, ADMIN.key_id, ADMIN.key_id,
    ]  # fmt: skip
    assert {entry["adapter"] for entry in found} == {"acme/x"}
    for number, entry in enumerate((upload, policy, rollback), start=1):
        assert set(entry) == ALWAYS | JUDGED | {"version", "override", "reason", "change", "published"}
        assert (entry["version"], entry["decision"]) == (number, "accepted")
        assert entry["projectors"] == place.service.state().projectors and len(entry["digest"]) == 64
    assert [entry["policy"]["mode"] for entry in (upload, policy, rollback)] == [
        "enforce", "report-only", "enforce",
    ]  # fmt: skip
    assert (policy["override"], policy["reason"]) == (True, "a test of ours")
    assert (rollback["override"], rollback["reason"]) == (False, "rollback to version 1")
    assert set(refused) == ALWAYS | JUDGED
    assert (refused["decision"], refused["reasons"]) == ("refused", ["relative_norm"])
    assert refused["policy"]["max_relative_norm"] == 1e-6
    for entry in (removed, unload):
        assert set(entry) == ALWAYS | {"change", "version"} and entry["decision"] == "removed"
    assert (removed["version"], unload["version"]) == (3, 1), "what was served until then"
    assert (load["version"], load["decision"]) == (1, "accepted")


def test_what_vllm_cannot_load_is_refused_recorded_and_not_kept(
    place: Place, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(_: LoRARequest) -> bool:
        raise RuntimeError("LoRA rank 4 is greater than max_lora_rank 2")

    async def use() -> None:
        async with place.manager() as (manager, engine):
            await manager.add(ADMIN, "x", adapters[1])
            monkeypatch.setattr(engine, "add_lora", fails)
            with pytest.raises(AdapterRefused, match="greater than max_lora_rank 2") as refused:
                await manager.add(ADMIN, "x", adapters[0], replace=True)
            assert refused.value.codes == ["not_loadable"]
            assert (
                Views(manager.reconciler).find(ADMIN, "x").version
                == (await Views(manager.reconciler).versions(ADMIN, "x")).live
            )
            monkeypatch.setattr(engine, "errored", True)
            with pytest.raises(EngineUnavailable, match="the engine has ended: LoRA rank 4"):
                await manager.add(ADMIN, "x", adapters[0], replace=True)
            assert (await Views(manager.reconciler).versions(ADMIN, "x")).current == 1

    asyncio.run(use())
    _, refused = entries(place)
    assert set(refused) == ALWAYS | JUDGED
    assert (refused["decision"], refused["reasons"]) == ("refused", ["not_loadable"])


def test_a_change_that_the_audit_log_does_not_have_stays_and_is_said_loudly(
    place: Place, adapters: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StoreUnavailable("no space left on device")

    async def use() -> None:
        async with place.manager() as (manager, _):
            monkeypatch.setattr(manager.audit, "record", full)
            assert (await manager.add(ADMIN, "x", adapters[0])).served is not None
            assert list(manager.reconciler.names.all()) == ["x"]

    asyncio.run(use())
    (said,) = [record for record in caplog.records if "is not in the audit log" in record.getMessage()]
    assert said.levelname == "ERROR"
    assert said.getMessage().startswith("upload of 'x' by admin/ops is not in the audit log: no space left")


def test_changes_of_one_name_in_one_process_wait_for_each_other(place: Place, adapters: list[Path]) -> None:
    """Without an answer 409 to whoever came second: there is nothing that they could have looked at."""

    async def use() -> None:
        async with place.manager() as (manager, _):
            await manager.add(ADMIN, "x", adapters[0])
            await asyncio.gather(
                *(manager.add(ADMIN, "x", folder, replace=True) for folder in reversed(adapters)),
                manager.set_policy(ADMIN, "x", {"max_relative_norm": 0.9}, False, ""),
            )
            assert (await Views(manager.reconciler).versions(ADMIN, "x")).current == 4

    asyncio.run(use())


def test_a_policy_is_stored_whole_and_a_stricter_one_has_none_behind_it(
    place: Place, adapters: list[Path]
) -> None:
    async def use() -> None:
        async with place.manager() as (manager, _):
            await manager.add(ADMIN, "x", adapters[0])
            default: Policy = manager.reconciler.copies.state.policy
            for cap in (0.9, 0.8):
                await manager.set_policy(ADMIN, "x", {"max_relative_norm": cap}, False, "")
                live = (await Views(manager.reconciler).versions(ADMIN, "x")).live
                assert live.policy == default.with_values({"max_relative_norm": cap}).to_mapping()
                assert (live.override, live.base_policy) == (False, {})
            with pytest.raises(PolicyError, match="number"):
                await manager.set_policy(ADMIN, "x", {"number": 3}, False, "")
            assert (await Views(manager.reconciler).versions(ADMIN, "x")).current == 3

    asyncio.run(use())


def test_a_tenants_rollback_is_no_override_though_the_same_policy_is_in_force(
    place: Place, adapters: list[Path]
) -> None:
    """As where the server's own policy was loosened meanwhile, and the admin set it without an override."""
    tenant = place.tenant()

    async def use() -> None:
        async with place.manager() as (manager, _):
            await manager.add(tenant, "acme/x", adapters[0])
            await manager.set_policy(ADMIN, "acme/x", {"max_relative_norm": 0.9}, False, "")
            live = (await Views(manager.reconciler).versions(tenant, "acme/x")).live
            overridden = dataclasses.replace(live, override=True)
            names = manager.reconciler.names
            for version in (overridden, live):  # 3 and 4
                names.update("acme/x", lambda record, version=version: record.with_version(version))  # type: ignore[misc,union-attr]
            await manager.reconciler.sync()
            await manager.roll_back(tenant, "acme/x", 3)
            assert not (await Views(manager.reconciler).versions(tenant, "acme/x")).live.override
            await manager.roll_back(ADMIN, "acme/x", 3)
            assert (await Views(manager.reconciler).versions(tenant, "acme/x")).live.override

    asyncio.run(use())


def test_an_adapter_that_cannot_be_served_now_is_not_found_as_if_it_were(
    place: Place, adapters: list[Path]
) -> None:
    async def use() -> None:
        async with place.manager() as (manager, _):
            entry = await manager.add(ADMIN, "x", adapters[0])
            lost = dataclasses.replace(entry, served=None, problem=GateUnavailable("the gate is down"))
            manager.reconciler.registry["x"] = lost
            with pytest.raises(GateUnavailable, match="the gate is down"):
                Views(manager.reconciler).find(ADMIN, "x")

    asyncio.run(use())
