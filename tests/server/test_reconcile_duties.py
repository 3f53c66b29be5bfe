"""How an API server process begins, what it does by itself, and how it ends. No server runs."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.lora.request import LoRARequest

from safelora_vllm import files
from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.errors import AdapterRefused, GateUnavailable, GuardError, Reason, StoreUnavailable
from safelora_vllm.gate.protocol import Judgement
from safelora_vllm.integration.server import reconcile, store_sync, watchdog
from safelora_vllm.integration.server.changes import Manager
from safelora_vllm.integration.server.engine import Pool
from safelora_vllm.integration.server.exam.no_exam import NoExam
from safelora_vllm.integration.server.published_copies import Copy, Judged
from safelora_vllm.integration.server.reconcile import Reconciler
from safelora_vllm.integration.server.rejudge import Rejudge
from safelora_vllm.integration.server.store_sync import StoreSync
from safelora_vllm.integration.server.watchdog import Watchdog
from safelora_vllm.policy import Policy
from safelora_vllm.report import Report
from safelora_vllm.store import AdapterRecord, NameStore, PublishedStore, Version
from safelora_vllm.store.audit_log import AuditLog
from tests.server.fake_engine import MODEL, FakeEngine
from tests.server.fake_server import Place
from tests.server.test_reconcile import save
from tests.tiny import Draft, lora

REPORT = Report("another name", "d" * 64, "p", Policy(), True, [], [])
REFUSED = AdapterRefused([Reason("nan", "a NaN")])


class Gated:
    """Published copies of which none is found, and a gate that answers when the test lets it."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.go.set()
        self.asked: list[str] = []
        self.answer: Exception | None = None
        self.rules = "r"
        self.state = SimpleNamespace(ruleset_digest="r")
        self.exam = NoExam()

    def find(self, _: str, __: Version) -> Copy | None:
        return None

    def ruleset(self, _: str) -> str:
        return self.rules

    async def ensure(self, _: str, name: str, *__: object) -> Judged:
        self.asked.append(name)
        await self.go.wait()
        if self.answer is not None:
            raise self.answer
        return Judged(Judgement(REPORT, "1", 1, self.rules), self.rules, False)

    async def ensure_version(self, name: str, _: Version) -> Judged:
        return await self.ensure("", name)

    async def copy_of(self, _: object, judgement: Judgement) -> Copy:
        return Copy(judgement.accepted_key(), REPORT, ())


def run(tmp_path: Path, test: Callable[[Reconciler, Gated, FakeEngine], Awaitable[None]]) -> None:
    """With one name in the store, which is not published."""

    async def started() -> None:
        save(NameStore(tmp_path), "chat", "1")
        engine, copies = FakeEngine(), Gated()
        pool, nothing = Pool(engine, NameStore(tmp_path)), cast(Any, None)
        made = Reconciler(pool, cast(Any, copies), 1, MODEL.__eq__, nothing)
        try:
            await test(made, copies, engine)
        finally:
            copies.go.set()
            await made.stop()

    asyncio.run(started())


async def settle() -> None:
    """Let everything run that can run."""
    for _ in range(20):
        await asyncio.sleep(0)


def start(
    place: Place, static: dict[str, Path], test: Callable[[Reconciler, FakeEngine], Coroutine[Any, Any, None]]
) -> None:
    """An API server process on a store, with adapters from its command line and two workers."""

    async def started() -> None:
        engine = place.engine()
        workers = engine.answers
        engine.answers = lambda: [[*workers()[0], *workers()[0]]]  # type: ignore[misc]
        given = {
            name: LoRARequest(name, number, str(folder))
            for number, (name, folder) in enumerate(static.items(), start=1)
        }
        models = SimpleNamespace(lora_requests=given, is_base_model=MODEL.__eq__)
        made = await Reconciler.start(engine, models, apart=True)
        try:
            await test(made, engine)
        finally:
            await made.stop()

    asyncio.run(started())


@pytest.fixture
def static(tmp_path: Path) -> dict[str, Path]:
    return {
        name: Draft(tensors=lora(seed=seed)).write(tmp_path / name)
        for seed, name in enumerate(("one", "two"))
    }


def test_adapters_of_the_command_line_are_served_from_their_published_copies(
    place: Place, static: dict[str, Path]
) -> None:
    async def test(made: Reconciler, engine: FakeEngine) -> None:
        requests = [entry.current().request for entry in made.registry.values()]
        assert [request.lora_int_id for request in requests] == [2**19, 2**19 + 16]
        assert made.names.next_id() > 2**19 + 16, "the store's ids are others"
        assert all(request.lora_path.startswith("safelora://") for request in requests)
        assert engine.loaded == requests, "under the new ids"
        assert engine.removed == [1, 2], "those by which vLLM had loaded the folders"
        assert [entry.current().report.adapter for entry in made.registry.values()] == ["one", "two"]
        assert [entry.load_seconds for entry in made.registry.values()] == [0.0, 0.0]
        assert place.kept() == set(), "the folders stay the operator's"
        assert made.watchdog.workers == {"guarded": 2, "unguarded": 0}

    start(place, static, test)


def test_the_command_line_goes_before_a_name_of_the_store(
    place: Place, static: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("one", MODEL):
        save(NameStore(place.store), name, "7")

    async def test(made: Reconciler, _: FakeEngine) -> None:
        await made.sync()
        assert list(made.registry) == ["one", "two"]
        assert made.registry["one"].folder == static["one"] and made.registry["one"].version is None

    start(place, static, test)
    assert caplog.text.count("'one' is not served: the server itself has that name") == 1


def test_a_folder_of_the_command_line_that_is_gone_stops_the_start(place: Place, tmp_path: Path) -> None:
    async def test(*_: Any) -> None:
        pytest.fail("it has started")

    with pytest.raises(GuardError, match=f"--lora-modules gone: there is no {tmp_path}/none"):
        start(place, {"gone": tmp_path / "none"}, test)


def test_a_start_serves_the_stores_names_and_watches_them(
    place: Place, static: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: list[bool] = []
    real = StoreSync._sync

    async def sync(self: StoreSync) -> None:
        watched.append(self.watch is not None)
        await real(self)

    monkeypatch.setattr(StoreSync, "_sync", sync)

    async def use() -> None:
        async with place.manager() as (manager, _):
            assert manager.reconciler.names.folder.is_dir(), "there is something to watch"
            watch = manager.reconciler.store.watch
            assert watch is not None and not watch.changed()
            await manager.add(place.tenant(), "acme/x", static["one"])
            assert watch.changed() and not watch.changed()
        assert watch._queue is None, "the end closes it"
        assert not manager.reconciler.background.tasks, "and leaves no work"
        async with place.manager() as (manager, _):
            assert list(manager.reconciler.registry) == ["acme/x"]

    asyncio.run(use())
    assert watched[0], "a change during the first look would be missed"


def test_a_beat_of_the_heart_looks_for_all_that_may_be_wrong_and_survives_it(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert reconcile._HEARTBEAT_SECONDS == 2.0, "as the documentation says"
    monkeypatch.setattr(reconcile, "_HEARTBEAT_SECONDS", 0.005)
    seen: list[str] = []

    async def look(_: Watchdog) -> None:
        seen.append("look")
        if len(seen) == 1:
            raise RuntimeError("what nobody expected")

    async def catch_up(_: StoreSync) -> None:
        seen.append("catch up")

    monkeypatch.setattr(Watchdog, "look", look)
    monkeypatch.setattr(StoreSync, "catch_up", catch_up)
    monkeypatch.setattr(Reconciler, "_prepare_again", lambda _: seen.append("prepare again"))

    async def test(_: Reconciler, __: FakeEngine) -> None:
        for _ in range(1000):
            if len(seen) >= 7:
                break
            await asyncio.sleep(0.005)

    start(place, {}, test)
    assert seen[:7] == ["look", *["look", "catch up", "prepare again"] * 2]
    assert "heartbeat: RuntimeError: what nobody expected" in caplog.text


async def ended(made: Reconciler) -> None:
    """All work in the background, but for the heart's."""
    while [task for task in made.background.tasks if "_heartbeat" not in str(task.get_coro())]:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("of_the_command_line", [False, True])
def test_a_damaged_copy_is_made_again_before_a_worker_needs_it(
    of_the_command_line: bool, place: Place, static: dict[str, Path]
) -> None:
    """What the pool has is served meanwhile, under the same id."""

    async def test(made: Reconciler, engine: FakeEngine) -> None:
        name = "one" if of_the_command_line else "acme/x"
        if not of_the_command_line:
            await Manager(made, made.audit, MODEL.__eq__).add(place.tenant(), name, static["two"])
        before = made.registry[name].current().request
        published = PublishedStore(place.store)
        key = before.lora_path.removeprefix("safelora://")
        weights = published.path(key) / WEIGHTS
        sound, damaged = weights.read_bytes(), bytearray(weights.read_bytes())
        damaged[-1] ^= 1
        weights.write_bytes(damaged)
        await made.watchdog.look()
        await ended(made)
        assert weights.read_bytes() == sound
        assert made.registry[name].current().request == before and engine.removed == [1]

    start(place, {"one": static["one"]}, test)


def test_a_copy_that_cannot_be_made_again_is_served_while_the_pool_has_it(
    place: Place, static: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is gone for a while takes nothing from whoever needs nothing of it."""

    async def test(made: Reconciler, _: FakeEngine) -> None:
        await Manager(made, made.audit, MODEL.__eq__).add(place.tenant(), "acme/x", static["two"])
        for folder in ("published", "raw"):
            shutil.rmtree(place.store / folder)
        for _ in range(3):
            await made.watchdog.look()
            await ended(made)
        assert made.registry["acme/x"].served is not None
        told = [line for line in caplog.messages if "cannot be checked or made again" in line]
        assert len(told) == 1 and "'acme/x'" in told[0] and "upload acme/x again" in told[0]

    start(place, {}, test)


def test_what_is_not_published_is_made_by_the_gate_and_served(tmp_path: Path) -> None:
    async def test(made: Reconciler, copies: Gated, _: FakeEngine) -> None:
        copies.go.clear()
        await made.sync()
        await settle()
        with pytest.raises(GateUnavailable, match="chat is being prepared"):
            made.registry["chat"].current()
        copies.go.set()
        await settle()
        assert made.registry["chat"].current().request.lora_path == "safelora://1"
        assert made.registry["chat"].current().report.adapter == "chat"
        assert copies.asked == ["chat"]

    run(tmp_path, test)


@pytest.mark.parametrize("answer", [None, GateUnavailable("down")])
def test_what_was_removed_while_the_gate_made_it_is_not_served(
    answer: Exception | None, tmp_path: Path
) -> None:
    async def test(made: Reconciler, copies: Gated, _: FakeEngine) -> None:
        copies.answer = answer
        copies.go.clear()
        await made.sync()
        await settle()
        made.names.update("chat", lambda _: None)
        await made.sync()
        copies.go.set()
        await settle()
        assert made.registry == {}

    run(tmp_path, test)


def test_what_could_not_be_served_is_tried_again_unless_it_was_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(made: Reconciler, copies: Gated, _: FakeEngine) -> None:
        copies.answer = GateUnavailable("the gate is down")
        await made.sync()
        await settle()
        with pytest.raises(GateUnavailable, match="the gate is down"):
            made.registry["chat"].current()
        assert "adapter 'chat' cannot be served now: the gate is down" in caplog.text
        copies.go.clear()
        for _ in range(3):  # the first is still at it
            made._prepare_again()
            await settle()
        assert copies.asked == ["chat"] * 2 and len(made.background.tasks) == 1
        copies.answer = REFUSED
        copies.go.set()
        await settle()
        with pytest.raises(AdapterRefused):
            made.registry["chat"].current()
        made._prepare_again()
        await settle()
        assert copies.asked == ["chat"] * 2
        made.registry["chat"] = dataclasses.replace(made.registry["chat"], problem=StoreUnavailable("full"))
        copies.answer = None
        made._prepare_again()
        await settle()
        assert made.registry["chat"].served is not None
        assert not made.background.tasks, "tasks that have ended are not kept"

    run(tmp_path, test)


def test_a_copy_that_was_lost_too_often_is_not_served(tmp_path: Path) -> None:
    async def test(made: Reconciler, _: Gated, __: FakeEngine) -> None:
        made.pool.mark_lost({f"safelora://1/{number}" for number in range(16)})
        await made.sync()
        await settle()
        with pytest.raises(StoreUnavailable, match="copy of chat was lost 16 times"):
            made.registry["chat"].current()

    run(tmp_path, test)


def test_weights_are_freed_once_nothing_serves_them(tmp_path: Path) -> None:
    async def test(made: Reconciler, _: Gated, engine: FakeEngine) -> None:
        await made.sync()
        await settle()
        entry = made.registry["chat"]
        made.served.put(dataclasses.replace(entry, problem=None))  # the same weights
        await settle()
        assert engine.removed == []
        other = LoRARequest("chat", 99, "safelora://other")
        assert made.served._wanted(entry.current().request) and not made.served._wanted(other)
        assert not made.served._wanted(LoRARequest("nobody", 16, "safelora://1"))
        made.names.update("chat", lambda _: None)
        await made.sync()
        await settle()
        assert engine.removed == [entry.current().request.lora_int_id]

    run(tmp_path, test)


def test_who_waits_for_the_store_and_goes_away_does_not_stop_the_look_at_it(tmp_path: Path) -> None:
    go = threading.Event()

    async def test(made: Reconciler, _: Gated, __: FakeEngine) -> None:
        real = made.names.all

        def slow() -> dict[str, AdapterRecord]:
            assert go.wait(30)
            return real()

        made.names.all = slow  # type: ignore[method-assign]
        waiting = asyncio.create_task(made.sync())
        await settle()
        waiting.cancel()
        await settle()
        assert waiting.cancelled() and made.store._syncing is not None
        go.set()
        await made.store._syncing
        assert list(made.registry) == ["chat"]

    run(tmp_path, test)


def test_a_store_that_hung_is_waited_for_again_once_it_has_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store_sync._PATIENCE_SECONDS == 1.0
    monkeypatch.setattr(store_sync, "_PATIENCE_SECONDS", 0.01)
    go = threading.Event()

    async def test(made: Reconciler, _: Gated, __: FakeEngine) -> None:
        real = made.names.all
        made.names.all = lambda: go.wait(30) and real()  # type: ignore[method-assign,assignment,return-value]
        made.store._start_sync()
        await made.refresh()
        assert made.store._store_hangs
        go.set()
        await made.sync()
        assert not made.store._store_hangs

    run(tmp_path, test)


@pytest.mark.parametrize(("age", "trusted"), [(0, False), (50_000_000, False), (50_000_001, True)])
def test_a_folder_that_just_changed_is_looked_at_again(
    age: int, trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time stamp is as coarse as the kernel's clock tick."""
    now = 10**18
    monkeypatch.setattr(files, "time", SimpleNamespace(time_ns=lambda: now, time=time.time))

    async def test(made: Reconciler, _: Gated, __: FakeEngine) -> None:
        looks: list[int] = []
        real = made.names.all
        made.names.all = lambda: looks.append(1) or real()  # type: ignore[method-assign,func-returns-value]
        made.names.stamp = lambda: now - age  # type: ignore[method-assign]
        for _ in range(3):
            await made.store.catch_up()
        assert len(looks) == (1 if trusted else 3)

    run(tmp_path, test)


def test_how_often_workers_are_asked() -> None:
    """At each look, which comes every 2 s, a worker that is asked spins for a second."""
    assert (watchdog._ATTEST_LOOKS, watchdog._ALERT_LOOKS) == (15, 30)


def test_what_another_host_decided_by_its_own_rules_hinders_no_judgement(tmp_path: Path) -> None:
    """Of one bucket, where each host has probes of its own."""
    names, audit = NameStore(tmp_path), AuditLog(tmp_path / "audit")
    mine = Version(1, "a" * 64, 1, 1, 0.0, "acme/ci", key="k", ruleset_digest="mine")
    theirs = dataclasses.replace(mine, key="t", ruleset_digest="theirs", judged=2.0)
    decided = dataclasses.replace(mine, key="s", judged=3.0)
    rules = {"acme/x": "mine"}
    copies = SimpleNamespace(ruleset=lambda name: rules[name])
    rejudge = Rejudge(cast(Any, copies), cast(Any, SimpleNamespace(names=names)), audit)

    def written(found: Version) -> bool:
        names.update("acme/x", lambda _: AdapterRecord("acme/x", 1, (found,)))
        return asyncio.run(rejudge._write("acme/x", mine, decided, {}))

    assert written(mine) and written(theirs)
    assert names.all()["acme/x"].live == decided
    assert not written(dataclasses.replace(theirs, ruleset_digest="mine")), "by the same rules: it is known"
    assert not written(dataclasses.replace(theirs, digest="b" * 64)), "other content"
    rules["acme/x"] = "theirs"
    assert not written(theirs), "the rules have changed since, and this decision is by the old ones"
