"""Changes that callers make, with the real gate, stores, quotas and audit log.

The engine only notes what it is asked. The routes are in `test_http_uploads` and `test_http_changes`.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.errors import (
    AdapterRefused,
    AlreadyLoaded,
    ChangedMeanwhile,
    QuotaExceeded,
    Reason,
    StoreUnavailable,
    UsageError,
)
from safelora_vllm.integration.server.changes import Manager
from safelora_vllm.integration.server.views import Views
from safelora_vllm.store.name_record import KEPT_VERSIONS
from safelora_vllm.tenants.principal import Principal
from tests.server.fake_server import Place
from tests.tiny import Q0, Draft, lora, lora_config

ADMIN = Principal("admin", "admin/ops")


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    """Of one size, but each with other weights."""
    return [Draft(tensors=lora(seed=seed)).write(tmp_path / str(seed)) for seed in range(3)]


def size(folder: Path) -> int:
    """Bytes of both files."""
    return sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS))


def test_max_bytes_from_the_keys_file_to_the_audit_log(place: Place, adapters: list[Path]) -> None:
    one, two, three = adapters
    tenant = place.tenant(max_bytes=2 * size(one))

    async def use() -> None:
        async with place.manager() as (manager, engine):
            await manager.add(tenant, "acme/1", one)
            await manager.add(tenant, "acme/2", two)
            kept = place.kept()
            assert len(kept) == 2
            with pytest.raises(QuotaExceeded, match=f"has {size(three):,} bytes, 0 are left of max_bytes"):
                await manager.add(tenant, "acme/3", three)
            assert place.kept() == kept and len(engine.loaded) == 2, "nothing was stored or loaded"
            await manager.add(tenant, "acme/3", one)  # content that is there costs nothing
            with pytest.raises(QuotaExceeded):  # the version before stays, so it counts
                await manager.add(tenant, "acme/2", three, replace=True)
            await manager.remove(tenant, "acme/2")
            await manager.add(tenant, "acme/2", three)
            await manager.add(ADMIN, "acme/4", two)  # an operator may
            with pytest.raises(QuotaExceeded, match="0 are left"):
                await manager.add(tenant, "acme/5", Draft(lora_config(lora_alpha=4)).write(two.parent / "5"))
        assert sorted(manager.reconciler.registry) == ["acme/1", "acme/2", "acme/3", "acme/4"]

    asyncio.run(use())
    assert place.audit() == [
        ("upload", "acme/1", "accepted", []),
        ("upload", "acme/2", "accepted", []),
        ("upload", "acme/3", "refused", ["quota"]),
        ("upload", "acme/3", "accepted", []),
        ("upload", "acme/2", "refused", ["quota"]),
        ("delete", "acme/2", "removed", []),
        ("upload", "acme/2", "accepted", []),
        ("upload", "acme/4", "accepted", []),
        ("upload", "acme/5", "refused", ["quota"]),
    ]


@pytest.mark.parametrize("limit", ["max_bytes", "max_adapters"])
@pytest.mark.parametrize("servers", [1, 2])
def test_two_names_at_once_do_not_exceed_a_quota_together(
    servers: int, limit: str, place: Place, adapters: list[Path]
) -> None:
    """Each is judged while the other has no name yet, in one API server process or in two."""
    tenant = place.tenant(**{limit: size(adapters[0]) if limit == "max_bytes" else 1})

    async def use() -> None:
        async with place.manager() as first, place.manager() as second:
            used = [first, first] if servers == 1 else [first, second]
            together = asyncio.Barrier(2)
            for _, engine in used:
                engine.together = together
            adding = (
                manager.add(tenant, f"acme/{number}", adapters[number])
                for number, (manager, _) in enumerate(used)
            )
            outcomes = await asyncio.gather(*adding, return_exceptions=True)
            over = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, Exception)]
            assert len(over) == 1, "one of them is over the quota"
            refused = over[0]
            assert isinstance(outcomes[refused], QuotaExceeded) and limit in str(outcomes[refused])
            manager, engine = used[refused]
            assert list(manager.reconciler.names.all()) == [f"acme/{1 - refused}"]
            ids = {request.lora_name: request.lora_int_id for request in engine.loaded}
            assert engine.removed == [ids[f"acme/{refused}"]], "its weights are freed"
            assert ("upload", f"acme/{refused}", "refused", ["quota"]) in place.audit()

    asyncio.run(use())


def test_one_name_at_once_by_two_servers_is_changed_by_one(place: Place, tmp_path: Path) -> None:
    """Four contents: one that the name serves already would be no change."""
    tenant = place.tenant()
    adapters = [Draft(tensors=lora(seed=seed)).write(tmp_path / str(seed)) for seed in range(4)]

    async def both(call: Callable[[Manager, int], Awaitable[object]], error: type[Exception]) -> None:
        async with place.manager() as (one, first), place.manager() as (other, second):
            first.together = second.together = asyncio.Barrier(2)
            outcomes = await asyncio.gather(call(one, 0), call(other, 1), return_exceptions=True)
            assert sum(isinstance(outcome, error) for outcome in outcomes) == 1, outcomes
            assert sum(isinstance(outcome, Exception) for outcome in outcomes) == 1

    def add(folders: list[Path], replace: bool) -> Callable[[Manager, int], Awaitable[object]]:
        return lambda manager, n: manager.add(tenant, "acme/x", folders[n], replace=replace)

    asyncio.run(both(add(adapters[:2], False), AlreadyLoaded))
    asyncio.run(both(add(adapters[2:], True), ChangedMeanwhile))


def test_the_oldest_of_ten_versions_makes_room_for_another(place: Place, tmp_path: Path) -> None:
    drafts = [Draft(tensors=lora([Q0], seed=seed)) for seed in range(KEPT_VERSIONS + 2)]
    *folders, other = (draft.write(tmp_path / str(number)) for number, draft in enumerate(drafts))
    tenant = place.tenant(max_bytes=KEPT_VERSIONS * size(other))

    async def use() -> None:
        async with place.manager() as (manager, _):
            for folder in folders:
                await manager.add(tenant, "acme/x", folder, replace=True)
            record = await Views(manager.reconciler).versions(tenant, "acme/x")
            assert [version.version for version in record.versions] == list(range(2, KEPT_VERSIONS + 2))
            back = await manager.roll_back(tenant, "acme/x", 2)
            assert back.version is not None and back.version.version == KEPT_VERSIONS + 2
            with pytest.raises(QuotaExceeded):
                await manager.add(tenant, "acme/y", other)

    asyncio.run(use())


def test_a_lowered_quota_holds_for_what_comes_next(place: Place, adapters: list[Path]) -> None:
    """Also for a rollback, which stores nothing new: it would serve a rank that is not allowed any more."""

    async def use() -> None:
        async with place.manager() as (manager, _):
            await manager.add(place.tenant(max_rank=4), "acme/x", adapters[0])
            await manager.add(place.tenant(max_rank=4), "acme/x", adapters[1], replace=True)
            low = place.tenant(max_rank=3)
            with pytest.raises(QuotaExceeded, match="rank 4, max_rank is 3"):
                await manager.add(low, "acme/y", adapters[0])
            with pytest.raises(QuotaExceeded, match="max_rank is 3, 4 would be needed"):
                await manager.roll_back(low, "acme/x", 1)
            assert manager.reconciler.names.all()["acme/x"].current == 2

    asyncio.run(use())
    assert place.audit()[2:] == [
        ("upload", "acme/y", "refused", ["quota"]),
        ("rollback", "acme/x", "refused", ["quota"]),
    ]


def test_a_tenant_does_not_bring_a_revoked_override_back(place: Place, adapters: list[Path]) -> None:
    """Neither into force nor into the record, from which a later and laxer server would take it."""
    tenant, lax = place.tenant(), {"mode": "report-only"}

    async def use() -> None:
        async with place.manager() as (manager, _):
            names = manager.reconciler.names
            await manager.add(tenant, "acme/x", adapters[0])
            await manager.set_policy(ADMIN, "acme/x", lax, True, "a test of ours")
            overridden = names.all()["acme/x"].live
            assert overridden.policy["mode"] == "report-only" and overridden.override
            await manager.set_policy(ADMIN, "acme/x", {}, False, "")
            back = await manager.roll_back(tenant, "acme/x", 2)
            live = names.all()["acme/x"].live
            assert back.current().report.policy.mode == "enforce"
            assert (live.version, live.policy, live.override, live.base_policy) == (4, {}, False, {})
            back = await manager.roll_back(ADMIN, "acme/x", 2)
            live = names.all()["acme/x"].live
            assert back.current().report.policy.mode == "report-only"
            assert (live.policy, live.override) == (overridden.policy, True)

    asyncio.run(use())


def test_going_back_to_an_override_leaves_a_stricter_policy_in_force(
    place: Place, adapters: list[Path]
) -> None:
    """Set since then, and by no override: it holds as far as it is as strict as the server's."""

    async def use() -> None:
        async with place.manager() as (manager, _):
            names = manager.reconciler.names
            await manager.add(ADMIN, "chat", adapters[0])
            await manager.set_policy(ADMIN, "chat", {"mode": "report-only"}, True, "a test of ours")
            await manager.set_policy(ADMIN, "chat", {"select": "all"}, False, "")
            strict = names.all()["chat"].live.policy
            back = await manager.roll_back(ADMIN, "chat", 2)
            live = names.all()["chat"].live
            assert (back.current().report.policy.mode, back.current().report.policy.select) == (
                "enforce",
                "all",
            )
            assert (live.version, live.policy, live.override) == (4, strict, False)

    asyncio.run(use())


@pytest.mark.parametrize(("override", "reason"), [(False, "a test of ours"), (True, ""), (True, " \t\n")])
def test_a_laxer_policy_needs_an_override_and_a_reason(
    override: bool, reason: str, place: Place, adapters: list[Path]
) -> None:
    async def use() -> None:
        async with place.manager() as (manager, _):
            await manager.add(ADMIN, "chat", adapters[0])
            with pytest.raises(UsageError, match='both "override": true and a "reason"'):
                await manager.set_policy(ADMIN, "chat", {"mode": "report-only"}, override, reason)
            assert manager.reconciler.names.all()["chat"].current == 1

    asyncio.run(use())


def test_refusals_of_a_tenant_are_a_bounded_number_of_lines(place: Place, tmp_path: Path) -> None:
    """Each upload of a few bytes would be a line, under the lock of all who write to the log."""
    tenant = place.tenant()
    wrong = Draft({**lora_config(), "use_dora": True}).write(tmp_path / "wrong")

    async def use() -> None:
        async with place.manager() as (manager, _):
            manager.start()
            await asyncio.sleep(0)
            for number in range(14):
                with pytest.raises(AdapterRefused):
                    await manager.add(tenant, f"acme/{number}", wrong)
                await manager.refused_source(tenant, "acme/x", "upload", ["source_not_allowed"])
            with pytest.raises(AdapterRefused):
                await manager.add(ADMIN, "acme/x", wrong)

    asyncio.run(use())
    lines = place.audit()
    by_gate = [line for line in lines if line[3] == ["dora"]]
    assert len(by_gate) == 10 + 1 + 1 and len(lines) == 2 * (10 + 1) + 1, "an admin's are all there"


@pytest.mark.parametrize("problem", ["refused", "unavailable"])
def test_a_load_replaces_what_is_refused_and_nothing_else(
    problem: str, place: Place, adapters: list[Path]
) -> None:
    """What is unavailable for a moment comes back as it was."""
    errors = {"refused": AdapterRefused([Reason("nan", "a NaN")]), "unavailable": StoreUnavailable("lost")}

    async def use() -> None:
        async with place.manager() as (manager, _):
            entry = await manager.add(ADMIN, "x", adapters[0], action="load")
            withdrawn = dataclasses.replace(entry, served=None, problem=errors[problem])
            manager.reconciler.served.put(withdrawn)
            if problem == "refused":
                await manager.add(ADMIN, "x", adapters[1], action="load")
            else:
                with pytest.raises(AlreadyLoaded):
                    await manager.add(ADMIN, "x", adapters[1], action="load")
                await manager.add(ADMIN, "x", adapters[0], action="load")
            found = manager.reconciler.registry["x"]
            assert found.served is not None and found.version is not None
            assert found.version.version == (2 if problem == "refused" else 1)

    asyncio.run(use())
