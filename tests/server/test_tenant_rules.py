"""Each tenant's adapters by its own rules, and what becomes of what is served when rules change.

The gate, stores and audit log are real; the engine only notes what it is asked.
"""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.errors import AdapterRefused, GateUnavailable, StoreUnavailable, UsageError
from safelora_vllm.gate.protocol import Admit, Ensure, Judgement
from safelora_vllm.integration.server import reconcile
from safelora_vllm.integration.server.changes import Manager
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.views import Views
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import serving
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.tenants.principal import Principal
from tests.server.fake_server import Place
from tests.tiny import Draft, lora

ADMIN = Principal("admin", "admin/ops")
FRIEND, STRANGER, OTHER = (Principal("tenant", f"{name}/ci", name) for name in ("friend", "stranger", "acme"))
KEYS = """
[tenants.friend]
less_strict = true
policy = {mode = "report-only"}
[tenants.stranger.policy]
select = "all"
[tenants.acme]
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "_HEARTBEAT_SECONDS", 0.05)


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [Draft(tensors=lora(seed=seed)).write(tmp_path / str(seed)) for seed in range(2)]


def write_keys(place: Place, text: str = KEYS) -> None:
    """As an operator should: a new file, renamed."""
    new = place.keys.with_name("new")
    new.touch(0o600)
    new.write_text(text)
    new.rename(place.keys)


def rules(entry: Entry) -> tuple[str, str]:
    """By which an adapter that is served was judged."""
    policy = entry.current().report.policy
    return policy.mode, policy.select


async def until(true: Callable[[], bool]) -> None:
    for _ in range(400):
        if true():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not become true")


def selected(manager: Manager, name: str) -> str | None:
    served = manager.reconciler.registry[name].served
    return served.report.policy.select if served else None


def records(place: Place, action: str = "rejudge") -> list[dict[str, Any]]:
    return [record for record in AuditLog(place.store / "audit").read() if record["action"] == action]


def test_a_tenants_rules_hold_for_all_that_it_does(place: Place, adapters: list[Path]) -> None:
    write_keys(place)
    expected = {
        FRIEND: ("report-only", "threshold"),
        STRANGER: ("enforce", "all"),
        OTHER: ("enforce", "threshold"),
    }

    async def use() -> None:
        async with place.manager() as (manager, _):
            for who, wanted in expected.items():
                name = f"{who.tenant}/x"
                assert rules(await manager.add(who, name, adapters[0])) == wanted
                assert rules(await manager.add(who, name, adapters[1], replace=True)) == wanted
                assert rules(await manager.roll_back(who, name, 1)) == wanted
                await manager.remove(who, name)
                assert rules(await manager.add(who, name, adapters[1])) == wanted
                assert (
                    rules(await manager.add(ADMIN, f"{who.tenant}/admins", adapters[0], action="load"))
                    == wanted
                )
        async with place.manager() as (manager, _):  # after a restart
            for who, wanted in expected.items():
                for name in ("x", "admins"):
                    assert rules(Views(manager.reconciler).find(who, f"{who.tenant}/{name}")) == wanted

    asyncio.run(use())
    told = {record["adapter"]: record for record in AuditLog(place.store / "audit").read()}
    assert (told["friend/x"]["override"], told["friend/x"]["reason"]) == (
        True,
        "less_strict in the keys file",
    )
    assert (told["stranger/x"]["override"], told["stranger/x"]["reason"]) == (False, "")
    assert not records(place), "nothing was judged anew"


def test_an_adapters_own_policy_is_compared_with_its_tenants(place: Place, adapters: list[Path]) -> None:
    write_keys(place)

    async def use() -> None:
        async with place.manager() as (manager, _):
            for who in (FRIEND, STRANGER):
                await manager.add(who, f"{who.tenant}/x", adapters[0])
            strict = await manager.set_policy(ADMIN, "friend/x", {"mode": "enforce"}, False, "")
            assert rules(strict) == ("enforce", "threshold"), "stricter than the friend's, so no override"
            again = await manager.add(FRIEND, "friend/x", adapters[1], replace=True)
            assert rules(again) == ("enforce", "threshold")
            with pytest.raises(UsageError, match="less strict than the tenant's in the keys file"):
                await manager.set_policy(ADMIN, "stranger/x", {"select": "threshold"}, False, "")
            loose = await manager.set_policy(ADMIN, "stranger/x", {"select": "threshold"}, True, "measured")
            assert rules(loose) == ("enforce", "threshold")
            again = await manager.add(STRANGER, "stranger/x", adapters[1], replace=True)
            assert rules(again) == ("enforce", "all"), "an override is for its content"

    asyncio.run(use())


def test_an_edit_of_the_keys_file_changes_what_is_served_on_all_servers(
    place: Place, adapters: list[Path]
) -> None:
    """The old copy is served until the new one is loaded. One record in the audit log for each decision."""
    write_keys(place, "[tenants.acme]\n")

    async def use() -> None:
        async with place.manager() as (one, engine), place.manager() as (two, others):
            names = ["acme/x", "acme/y", "shared"]
            for name, folder in zip(names, [*adapters, adapters[0]], strict=True):
                await one.add(ADMIN, name, folder)
            await two.reconciler.refresh()
            before = {name: one.reconciler.registry[name].current().request for name in names}
            seen: set[str | None] = set()
            write_keys(place, '[tenants.acme.policy]\nselect = "all"\n')

            def done() -> bool:
                found = [selected(server, name) for server in (one, two) for name in names[:2]]
                seen.update(found)
                return set(found) == {"all"}

            await until(done)
            assert None not in seen, "never withdrawn"
            after = {name: one.reconciler.registry[name].current().request for name in names}
            assert after == {name: two.reconciler.registry[name].current().request for name in names}, (
                "they agree on ids and paths"
            )
            assert after["shared"] == before["shared"]
            seconds = {server.reconciler.registry["acme/x"].load_seconds for server in (one, two)}
            assert len(seconds) == 1 and min(seconds) > 0, "that of the upload"
            for name in names[:2]:
                assert after[name].lora_int_id != before[name].lora_int_id
                assert after[name] in [*engine.loaded, *others.loaded], "before it is served"
                live = one.reconciler.names.all()[name].live
                assert (live.version, f"safelora://{live.key}") == (1, after[name].lora_path)
            await until(lambda: {before[n].lora_int_id for n in names[:2]} <= set(engine.removed))
            write_keys(place, "[tenants.acme]\n")
            await until(lambda: {selected(one, name) for name in names[:2]} == {"threshold"})
            await until(lambda: {selected(two, name) for name in names[:2]} == {"threshold"})

    asyncio.run(use())
    found = records(place)
    assert sorted((r["adapter"], r["policy"]["select"]) for r in found) == [
        ("acme/x", "all"), ("acme/x", "threshold"), ("acme/y", "all"), ("acme/y", "threshold"),
    ]  # fmt: skip
    assert {(r["actor"], r["decision"], r["version"], r["override"]) for r in found} == {
        ("server", "accepted", 1, False)
    }


def test_rules_that_refuse_withdraw_an_adapter_and_say_why(place: Place, adapters: list[Path]) -> None:
    write_keys(place, "[tenants.acme]\n")

    async def use() -> None:
        async with place.manager() as (one, _), place.manager() as (two, _):
            added = await one.add(OTHER, "acme/x", adapters[0])
            norm = added.current().report.total_norm
            await two.reconciler.refresh()
            write_keys(place, f"[tenants.acme.policy]\nmax_total_norm = {norm / 2}\n")
            await until(lambda: not (selected(one, "acme/x") or selected(two, "acme/x")))
            for server in (one, two):
                with pytest.raises(AdapterRefused, match=r"\[total_norm\] all modules together"):
                    Views(server.reconciler).find(OTHER, "acme/x")
            record = (await Views(one.reconciler).versions(OTHER, "acme/x")).live
            assert [reason.code for reason in record.refused] == ["total_norm"] and record.judged
            with pytest.raises(AdapterRefused):  # a tenant cannot shed it
                await one.roll_back(OTHER, "acme/x", 1)
            await one.remove(OTHER, "acme/x")
            with pytest.raises(AdapterRefused):
                await two.add(OTHER, "acme/x", adapters[0])
            await one.reconciler.refresh()
            write_keys(place, "[tenants.acme]\n")
            await two.add(OTHER, "acme/x", adapters[0])
            await one.reconciler.refresh()
            write_keys(place, f"[tenants.acme.policy]\nmax_total_norm = {norm / 2}\n")
            await until(lambda: not (selected(one, "acme/x") or selected(two, "acme/x")))
        async with place.manager() as (one, _):  # after a restart, still
            with pytest.raises(AdapterRefused, match="total_norm"):
                Views(one.reconciler).find(OTHER, "acme/x")
            await asyncio.sleep(0.2)  # it was judged again and that is no news
            write_keys(place, "[tenants.acme]\n")
            await until(lambda: selected(one, "acme/x") == "threshold")

    asyncio.run(use())
    assert place.audit() == [
        ("upload", "acme/x", "accepted", []),
        ("rejudge", "acme/x", "refused", ["total_norm"]),
        ("rollback", "acme/x", "refused", ["total_norm"]),
        ("delete", "acme/x", "removed", []),
        ("upload", "acme/x", "refused", ["total_norm"]),
        ("upload", "acme/x", "accepted", []),
        ("rejudge", "acme/x", "refused", ["total_norm"]),
        ("rejudge", "acme/x", "accepted", []),
    ]


def test_a_restart_with_another_policy_is_in_the_audit_log_once(
    cache: ProjectorCache, adapters: list[Path], tmp_path: Path
) -> None:
    async def start(place: Place, servers: int = 2) -> list[str]:
        async with place.manager() as (one, _), place.manager() as (two, _):
            used = (one, two)[:servers]
            await until(lambda: all(_settled(server, "chat") for server in used))
            await asyncio.sleep(0.2)
            store = one.reconciler.names
            told = serving.load(store.root)
            assert told is not None
            return [_word(server, "chat") for server in used] + [told.state(store.all()["chat"]).word]

    async def first(place: Place) -> float:
        async with place.manager() as (manager, _):
            return (await manager.add(ADMIN, "chat", adapters[0])).current().report.total_norm

    with Place.start(cache, tmp_path) as place:
        norm = asyncio.run(first(place))
    for policy, expected in (
        ({"max_total_norm": norm / 2}, "refused"),
        ({"max_total_norm": norm / 2}, "refused"),
        ({"max_total_norm": norm * 2}, "served"),
        ({"select": "all"}, "served"),
    ):
        (tmp_path / "gate.sock").unlink()
        with Place.start(cache, tmp_path, **policy) as place:
            assert asyncio.run(start(place)) == [expected] * 3
    assert place.audit() == [
        ("upload", "chat", "accepted", []),
        ("rejudge", "chat", "refused", ["total_norm"]),
        ("rejudge", "chat", "accepted", []),
        ("rejudge", "chat", "accepted", []),
    ]
    assert records(place)[0]["policy"]["max_total_norm"] == norm / 2


def test_a_restart_serves_an_old_copy_only_where_it_is_as_strict_as_today(
    cache: ProjectorCache, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stricter policy, or other rules besides it, and the adapter waits for the gate."""

    async def first(place: Place) -> float:
        async with place.manager() as (manager, _):
            return (await manager.add(ADMIN, "chat", adapters[0])).current().report.total_norm

    with Place.start(cache, tmp_path) as place:
        norm = asyncio.run(first(place))

    async def starts(place: Place) -> bool:
        """Whether it is served while the gate judges nothing; then it is, by the new rules."""
        answers = threading.Event()
        real = place.service.ensure

        def ensure(call: Ensure) -> Judgement:
            assert answers.wait(30)
            return real(call)

        monkeypatch.setattr(place.service, "ensure", ensure)
        async with place.manager() as (manager, _):
            await asyncio.sleep(0.2)
            served = manager.reconciler.registry["chat"].served is not None
            answers.set()
            ruleset = place.service.state().ruleset_digest
            await until(lambda: manager.reconciler.registry["chat"].version.ruleset_digest == ruleset)  # type: ignore[union-attr]
            assert manager.reconciler.registry["chat"].current().report.policy == place.service.state().policy
            return served

    folder = tmp_path / "other"
    folder.mkdir()
    with Place.start(cache, folder, max_total_norm=4 * norm) as place:
        asyncio.run(first(place))
    for policy, served in (
        ({"max_total_norm": 6 * norm}, True),
        ({"max_total_norm": 2 * norm}, False),
        ({"max_total_norm": 2 * norm, "mode": "report-only"}, True),
        ({"max_total_norm": 2 * norm}, False),
    ):
        (folder / "gate.sock").unlink()
        with Place.start(cache, folder, **policy) as place:
            assert asyncio.run(starts(place)) == served, policy
    (folder / "gate.sock").unlink()
    with Place.start(cache, folder, max_total_norm=6 * norm) as place:
        settings = place.service._settings
        limits = dataclasses.replace(settings.limits, max_rank=settings.limits.max_rank - 1)
        place.service._settings = dataclasses.replace(settings, limits=limits)
        assert not asyncio.run(starts(place)), "another rule has changed too"


def test_a_refusal_is_evaluated_once_for_all_api_servers_of_a_start(
    cache: ProjectorCache, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first(place: Place) -> float:
        async with place.manager() as (manager, _):
            return (await manager.add(ADMIN, "chat", adapters[0])).current().report.total_norm

    async def start(place: Place) -> None:
        async with place.manager() as (one, _), place.manager() as (two, _), place.manager() as (three, _):
            for server in (one, two, three):
                await until(lambda server=server: _settled(server, "chat"))
                with pytest.raises(AdapterRefused, match="total_norm"):
                    server.reconciler.registry["chat"].current()
            await asyncio.sleep(0.3)

    with Place.start(cache, tmp_path) as place:
        norm = asyncio.run(first(place))
    for _ in range(2):  # the second start finds the refusal in the record, and looks again
        (tmp_path / "gate.sock").unlink()
        with Place.start(cache, tmp_path, max_total_norm=norm / 2) as place:
            evaluated, real = [], place.service.admit

            def admit(call: Admit, real: Callable[[Admit], Judgement] = real) -> Judgement:
                evaluated.append(call.name)  # noqa: B023
                return real(call)

            monkeypatch.setattr(place.service, "admit", admit)
            asyncio.run(start(place))
            assert evaluated == ["chat"]


def _settled(manager: Manager, name: str) -> bool:
    entry = manager.reconciler.registry[name]
    return entry.served is not None or isinstance(entry.problem, AdapterRefused)


def _word(manager: Manager, name: str) -> str:
    return "served" if manager.reconciler.registry[name].served else "refused"


def test_while_the_gate_is_down_what_is_served_stays_served(
    place: Place, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_keys(place, "[tenants.acme]\n")

    async def use() -> None:
        async with place.manager() as (manager, _):
            await manager.add(OTHER, "acme/x", adapters[0])
            asked = []

            def down(*_: object, **__: object) -> None:
                asked.append(1)
                raise GateUnavailable("the gate is being restarted")

            with monkeypatch.context() as patch:
                patch.setattr(manager.reconciler.copies.gate, "ensure", down)
                write_keys(place, '[tenants.acme.policy]\nselect = "all"\n')
                await until(lambda: len(asked) > 2)
                assert selected(manager, "acme/x") == "threshold"
            await until(lambda: selected(manager, "acme/x") == "all")

    asyncio.run(use())


def test_hosts_with_other_rules_do_not_undo_each_others_decisions_without_end(
    cache: ProjectorCache, adapters: list[Path], tmp_path: Path
) -> None:
    """Two gates on one store, as while a new policy is rolled out host by host."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "store").symlink_to(tmp_path / "store")
    (tmp_path / "store").mkdir()

    async def use(a: Place, b: Place) -> None:
        async with a.manager() as (old, _):
            await old.add(ADMIN, "chat", adapters[0])
            async with b.manager() as (new, _):
                await until(lambda: selected(new, "chat") == "all")
                await asyncio.sleep(0.5)
                assert selected(old, "chat") == "threshold" and selected(new, "chat") == "all"

    with Place.start(cache, tmp_path) as a, Place.start(cache, tmp_path / "b", select="all") as b:
        asyncio.run(use(a, b))
        assert len(records(a)) == 1


def test_a_new_copy_that_vllm_cannot_load_is_a_refusal(
    place: Place, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_keys(place, "[tenants.acme]\n")

    async def use() -> None:
        async with place.manager() as (manager, engine):
            await manager.add(OTHER, "acme/x", adapters[0])

            async def fails(_: object) -> bool:
                raise ValueError("no room for it")

            monkeypatch.setattr(engine, "add_lora", fails)
            write_keys(place, '[tenants.acme.policy]\nselect = "all"\n')
            await until(lambda: not selected(manager, "acme/x"))
            with pytest.raises(AdapterRefused, match="vLLM cannot load the adapter: no room for it"):
                Views(manager.reconciler).find(OTHER, "acme/x")

    asyncio.run(use())
    (record,) = records(place)
    assert (record["decision"], record["reasons"]) == ("refused", ["not_loadable"])


def test_an_adapter_whose_upload_is_lost_is_not_served_by_former_rules(
    place: Place, adapters: list[Path]
) -> None:
    write_keys(place, "[tenants.acme]\n")

    async def use() -> None:
        async with place.manager() as (manager, _):
            added = await manager.add(OTHER, "acme/x", adapters[0])
            shutil.rmtree(place.store / "raw" / added.current().report.digest)
            write_keys(place, '[tenants.acme.policy]\nselect = "all"\n')
            await until(lambda: not selected(manager, "acme/x"))
            with pytest.raises(StoreUnavailable, match="upload acme/x again"):
                Views(manager.reconciler).find(OTHER, "acme/x")
            await manager.add(OTHER, "acme/x", adapters[0], replace=True)
            assert selected(manager, "acme/x") == "all"

    asyncio.run(use())
    assert not records(place), "nothing was decided"


def test_a_change_by_a_caller_meanwhile_goes_first(
    place: Place, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was judged anew is then not the newest: nothing of it is kept, loaded or recorded."""
    write_keys(place, "[tenants.acme]\n")

    async def use() -> None:
        async with place.manager() as (manager, engine), place.manager() as (other, _):
            await manager.add(OTHER, "acme/x", adapters[0])
            await other.reconciler.refresh()
            real, done = manager.reconciler.pool.new_id, asyncio.Event()

            async def new_id() -> int:
                if not done.is_set():
                    await other.add(OTHER, "acme/x", adapters[1], replace=True)
                    done.set()
                return await real()

            monkeypatch.setattr(manager.reconciler.pool, "new_id", new_id)
            monkeypatch.setattr(other.reconciler, "_prepare_again", lambda: None)  # only one judges anew
            write_keys(place, '[tenants.acme.policy]\nselect = "all"\n')
            await until(lambda: done.is_set() and selected(manager, "acme/x") == "all")
            record = manager.reconciler.names.all()["acme/x"]
            assert [version.judged for version in record.versions] == [0.0, 0.0]
            ids = {request.lora_int_id for request in engine.loaded} - {record.versions[0].id}
            await until(lambda: ids <= set(engine.removed))

    asyncio.run(use())
    assert not records(place)
