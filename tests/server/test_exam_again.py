"""Examining again what is served: by an admin's request, at intervals, and what another server found."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from safelora_vllm.errors import ExamUnavailable, StoreUnavailable
from safelora_vllm.exam.score import Score
from safelora_vllm.integration.adapter_uri import published_key
from safelora_vllm.integration.server.exam import schedule
from safelora_vllm.integration.server.exam.again import Again
from safelora_vllm.integration.server.exam.schedule import Schedule
from safelora_vllm.store.audit_log import AuditLog
from safelora_vllm.store.verdicts import Examined
from safelora_vllm.tenants.principal import Principal
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_server import SECRET, FakeServer, Place
from tests.server.test_exam_server import (  # noqa: F401
    Start,
    adapters,
    answer_of,
    answer_of_lookup,
    is_listed,
    place,
    start,
)

STRICTEST_ONLY = lambda report: 0.0 if report.policy.select == "all" else 1.0  # noqa: E731


def until(server: FakeServer, true: Callable[[], bool]) -> None:
    for _ in range(400):
        if true():
            return
        server.portal.call(asyncio.sleep, 0.02)
    raise AssertionError("it did not become true")


def until_refused(server: FakeServer, *names: str) -> None:
    until(server, lambda: all(answer_of_lookup(server, name) == 422 for name in names))


def examine_again(server: FakeServer, name: str, key: str = ADMIN_KEY) -> Any:
    return server.client(key).post(f"/v1/adapters/{name}/exam")


def lines(place: Place) -> list[tuple[str, str, str, list[str]]]:  # noqa: F811
    """Of re-examinations in the audit log: actor, adapter, decision, reasons."""
    found = [line for line in AuditLog(place.store / "audit").read() if line.get("again")]
    return [(line["actor"], line["adapter"], line["decision"], line["reasons"]) for line in found]


def test_the_held_out_half_is_asked(start: Start, adapters: dict[str, Path], place: Place) -> None:  # noqa: F811
    place.tenant()
    with start(keys=str(place.keys)) as server:
        http, engine = server.client(ADMIN_KEY), server.engine
        assert upload(http, "acme/useful", adapters["useful"]).status_code == 201
        first = set(engine.texts)
        answer = examine_again(server, "acme/useful")
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert (body["passed"], body["withdrawn"], body["bound"]) == (True, False, 0.0)
        assert (body["adapter"], body["probes"], body["threshold"]) == ("acme/useful", 64, 0.02)
        assert abs(body["at"] - time.time()) < 60
        held_out = set(engine.texts) - first
        assert len(first) == len(held_out) == 64 and len(engine.texts) == 128
        shown = http.get("/v1/adapters/acme/useful").json()["exam"]
        assert shown["again"]["passed"] and shown["again"]["bound"] == 0.0 and shown["passed"]
        tenants = server.client(SECRET).get("/v1/adapters/acme/useful").json()["exam"]
        assert tenants["again"] == {
            "passed": True,
            **dict.fromkeys(("by_opinion", "drop", "bound", "worst", "seconds", "at", "over_refusal")),
        }
        # Not a tenant's to ask for: it would cost the engine, and tell more of the probes.
        assert examine_again(server, "acme/useful", SECRET).status_code == 403
        assert examine_again(server, "nobody").status_code == 404
    assert lines(place) == [("admin/environment", "acme/useful", "accepted", [])]
    with start(exam="off", ladder=None, keys=str(place.keys)) as server:
        until(server, lambda: answer_of(server, "acme/useful") == 200)
        answer = examine_again(server, "acme/useful")
        assert answer.status_code == 400 and "--exam report or --exam enforce" in answer.text


def test_what_fails_is_withdrawn_and_climbs(start: Start, adapters: dict[str, Path], place: Place) -> None:  # noqa: F811
    """On all servers of the store. The rung that brings it back has passed both halves."""
    with start() as server, start() as beside:
        for name in ("useful", "twin"):  # one copy
            assert upload(server.client(ADMIN_KEY), name, adapters["useful"]).status_code == 201
        until(beside, lambda: answer_of(beside, "useful") == 200)
        server.engine.drop = beside.engine.drop = STRICTEST_ONLY
        answer = examine_again(server, "useful").json()
        assert (answer["passed"], answer["withdrawn"], answer["drop"]) == (False, True, 1.0)
        assert server.app.state.safelora.watchdog.withdrawn == 2

        def is_strict(which: FakeServer, name: str) -> bool:
            entry = which.app.state.safelora.registry[name]
            assert answer_of_lookup(which, name) in (200, 503)
            return entry.served is not None and entry.served.report.policy.select == "all"

        for name in ("useful", "twin"):
            until(server, lambda name=name: is_strict(server, name))  # type: ignore[misc]
            until(beside, lambda name=name: is_strict(beside, name))  # type: ignore[misc]
        strict = server.client(ADMIN_KEY).get("/v1/adapters/useful").json()["exam"]
        assert strict["passed"] and strict["again"]["passed"], "both halves"
    assert sorted(lines(place)) == [
        ("admin/environment", "useful", "refused", ["exam"]), ("server", "twin", "refused", ["exam"]),
    ]  # fmt: skip
    assert ("rejudge", "useful", "accepted", []) in place.audit()
    with start(engine={"drop": STRICTEST_ONLY}) as server:
        assert is_listed(server.client(ADMIN_KEY), "useful") and not server.engine.asked


def test_a_tenant_whose_adapter_failed_is_asked_both_halves(
    start: Start,  # noqa: F811
    adapters: dict[str, Path],  # noqa: F811
    place: Place,  # noqa: F811
) -> None:
    """One changed weight is other content, which passes the first half as what failed did."""

    def halves(server: FakeServer, name: str) -> int:
        served = server.app.state.safelora.registry[name].served
        key = published_key(served.request.lora_path)
        return len(list(place.store.glob(f"exam/verdicts/*/{key}.json")))

    place.tenant()
    with start(keys=str(place.keys)) as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "acme/useful", adapters["useful"]).status_code == 201
        assert halves(server, "acme/useful") == 1
        server.engine.drop = lambda _: 1.0
        assert examine_again(server, "acme/useful").json()["withdrawn"]
        until(server, lambda: answer_of_lookup(server, "acme/useful") == 422)
        server.engine.drop = lambda _: 0.0
        assert upload(http, "globex/other", adapters["other"]).status_code == 201
        assert halves(server, "globex/other") == 1
    with start(keys=str(place.keys)) as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "acme/another", adapters["other"]).status_code == 201
        assert halves(server, "acme/another") == 2


def test_what_was_examined_before_its_tenant_was_marked_is_judged_after_that(
    start: Start,  # noqa: F811
    adapters: dict[str, Path],  # noqa: F811
    place: Place,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mark comes between the exam of an upload and its commit."""
    place.tenant()
    with start(keys=str(place.keys)) as server:
        exam = server.app.state.safelora.copies.exam
        real = exam.is_marked

        async def before_the_mark(name: str) -> bool:
            found = bool(await real(name))
            await exam.note_failures([name])
            return found

        monkeypatch.setattr(exam, "is_marked", before_the_mark)
        assert upload(server.client(ADMIN_KEY), "acme/x", adapters["useful"]).status_code == 201
        key = published_key(server.app.state.safelora.registry["acme/x"].served.request.lora_path)
        until(server, lambda: len(list(place.store.glob(f"exam/verdicts/*/{key}.json"))) == 2)


def test_a_name_that_is_removed_during_its_re_examination_marks_its_tenant(
    start: Start,  # noqa: F811
    adapters: dict[str, Path],  # noqa: F811
    place: Place,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or replaced: the next upload with one changed weight would pass the first half as it did."""
    place.tenant()
    with start(keys=str(place.keys)) as server:
        state, http = server.app.state, server.client(ADMIN_KEY)
        assert upload(http, "acme/x", adapters["useful"]).status_code == 201
        exam = state.safelora.copies.exam
        real = exam.examine_again

        async def and_removed(name: str, *rest: Any) -> Examined:
            found: Examined = await real(name, *rest)
            await state.safelora_manager.remove(Principal("admin", "admin/ops"), name)
            return found

        with monkeypatch.context() as patch:
            patch.setattr(exam, "examine_again", and_removed)
            server.engine.drop = lambda _: 1.0
            assert examine_again(server, "acme/x").json()["withdrawn"]
        server.engine.drop = lambda _: 0.0
        assert upload(http, "acme/y", adapters["other"]).status_code == 201
        key = published_key(state.safelora.registry["acme/y"].served.request.lora_path)
        assert len(list(place.store.glob(f"exam/verdicts/*/{key}.json"))) == 2, "both halves"


def test_nothing_of_a_marked_tenant_is_served_by_the_first_half_alone(
    start: Start,  # noqa: F811
    adapters: dict[str, Path],  # noqa: F811
    place: Place,  # noqa: F811
) -> None:
    """Neither an older version, nor what it has under other names, nor what is judged by other rules."""
    place.tenant()
    with start(keys=str(place.keys)) as server:
        http, engine = server.client(ADMIN_KEY), server.engine
        assert upload(http, "acme/x", adapters["other"]).status_code == 201
        assert upload(http, "acme/x", adapters["useful"], replace=True).status_code == 201
        assert upload(http, "acme/y", adapters["third"]).status_code == 201
        assert upload(http, "globex/z", adapters["fourth"]).status_code == 201
        engine.drop = lambda _: 1.0
        first = len(engine.asked)
        assert examine_again(server, "acme/x").json()["withdrawn"]
        until_refused(server, "acme/x", "acme/y")
        assert answer_of_lookup(server, "globex/z") == 200 and len(engine.asked) > first + 64
        back = server.client(SECRET).post("/v1/adapters/acme/x/rollback", json={"version": 1})
        assert back.status_code == 422, back.text
    with start(keys=str(place.keys), engine={"drop": lambda _: 1.0}, ladder="input-removal:0.1") as server:
        until_refused(server, "acme/x", "acme/y")


def test_a_mark_that_cannot_be_written_is_made_up_for(
    start: Start,  # noqa: F811
    adapters: dict[str, Path],  # noqa: F811
    place: Place,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the judgement that follows, which finds the verdict in the store."""
    place.tenant()
    with start(keys=str(place.keys)) as server:
        assert upload(server.client(ADMIN_KEY), "acme/x", adapters["useful"]).status_code == 201
        server.engine.drop = lambda _: 1.0
        failed = server.app.state.safelora.copies.exam.examiner.failed
        note, full = failed.note, StoreUnavailable("the disk is full")
        tries: list[str] = []

        def once(tenant: str) -> None:
            tries.append(tenant)
            if len(tries) == 1:
                raise full
            note(tenant)

        monkeypatch.setattr(failed, "note", once)
        assert examine_again(server, "acme/x").json()["withdrawn"]
        until(server, lambda: answer_of_lookup(server, "acme/x") == 422)
        assert set(tries) == {"acme"} and len(tries) > 1 and failed.has("acme")
    assert lines(place) == [("admin/environment", "acme/x", "refused", ["exam"])]


def test_both_halves_of_an_upload_are_one_exam_of_its_tenant(
    start: Start,  # noqa: F811
    adapters: dict[str, Path],  # noqa: F811
    place: Place,  # noqa: F811
) -> None:
    """Also where the first half is known: else its author could hold exams without a score for nothing."""
    place.tenant()
    with start(keys=str(place.keys)) as server:
        acme, limits = server.client(SECRET), server.app.state.safelora.copies.exam.examiner.limits
        assert upload(server.client(ADMIN_KEY), "known", adapters["useful"]).status_code == 201
        server.app.state.safelora.copies.exam.examiner.failed.note("acme")
        assert upload(acme, "acme/known", adapters["useful"]).status_code == 201
        assert len(limits._times["acme"]) == 1
        assert upload(acme, "acme/new", adapters["other"]).status_code == 201
        assert len(limits._times["acme"]) == 2


def test_a_failure_counts_for_the_same_files_by_other_rules(start: Start, adapters: dict[str, Path]) -> None:  # noqa: F811
    with start() as server:
        http, registry = server.client(ADMIN_KEY), server.app.state.safelora.registry
        for name, cap in (("useful", 0.8), ("twin", 0.9)):
            assert upload(http, name, adapters["useful"]).status_code == 201
            rules = {"policy": {"max_relative_norm": cap}}
            assert http.put(f"/v1/adapters/{name}/policy", json=rules).status_code == 200
        assert len({registry[name].served.request.lora_path for name in ("useful", "twin")}) == 2
        server.engine.drop = lambda _: 1.0
        assert examine_again(server, "useful").json()["withdrawn"]
        until(server, lambda: answer_of_lookup(server, "twin") == 422)
    with start() as server:
        assert answer_of(server, "twin") == 422


def test_what_fails_on_all_rungs_is_refused(start: Start, adapters: dict[str, Path]) -> None:  # noqa: F811
    with start() as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "useful", adapters["useful"]).status_code == 201
        server.engine.drop = lambda _: 1.0
        assert examine_again(server, "useful").json()["withdrawn"]
        until(server, lambda: answer_of_lookup(server, "useful") == 422)
        assert not is_listed(http, "useful") and examine_again(server, "useful").status_code == 422
        assert upload(http, "again", adapters["useful"]).status_code == 422
    with start() as server:
        assert answer_of(server, "useful") == 422
        # Other content is taken as ever.
        assert upload(server.client(ADMIN_KEY), "useful", adapters["other"], replace=True).status_code == 201


@pytest.mark.parametrize("killed", [False, True])
def test_what_another_server_found_counts(
    start: Start,  # noqa: F811
    adapters: dict[str, Path],  # noqa: F811
    killed: bool,
) -> None:
    """killed: it was, before it could do anything but keep the verdict."""
    with start() as server:
        assert upload(server.client(ADMIN_KEY), "useful", adapters["useful"]).status_code == 201
        (key,) = set(server.engine.asked)
        sheets = server.app.state.safelora.copies.exam.examiner.sheets
        found = sheets.first.verdicts.get(key)
        server.engine.drop = lambda _: 1.0
        failed = Examined(Score(1.0, 1.0, 1.0, 64), 1.0, found.files, time.time())
        if not killed:
            sheets.held_out.verdicts.put(key, failed)
            until(server, lambda: answer_of_lookup(server, "useful") == 422)
    if killed:
        sheets.held_out.verdicts.put(key, failed)
        with start(engine={"drop": lambda _: 1.0}) as server:
            assert not is_listed(server.client(ADMIN_KEY), "useful")
            until(server, lambda: answer_of_lookup(server, "useful") == 422)


def test_no_score_changes_nothing(start: Start, adapters: dict[str, Path]) -> None:  # noqa: F811
    with start() as server:
        assert upload(server.client(ADMIN_KEY), "useful", adapters["useful"]).status_code == 201

        async def broken() -> None:
            raise RuntimeError("secret details of a probe")

        server.engine.before = broken
        answer = examine_again(server, "useful")
        assert answer.status_code == 503 and "secret" not in answer.text
        assert is_listed(server.client(ADMIN_KEY), "useful")


def test_report_withdraws_nothing(start: Start, adapters: dict[str, Path], place: Place) -> None:  # noqa: F811
    with start(exam="report", ladder=None, policy={"method": "safe-lora"}) as server:
        http = server.client(ADMIN_KEY)
        assert upload(http, "harmful", adapters["harmful"]).status_code == 201
        answer = examine_again(server, "harmful").json()
        assert (answer["passed"], answer["withdrawn"]) == (False, False)
        assert is_listed(http, "harmful")
    assert lines(place) == [("admin/environment", "harmful", "accepted", ["exam"])]


def test_one_server_examines_at_intervals(start: Start, adapters: dict[str, Path], place: Place) -> None:  # noqa: F811
    """When the last exam was is in the store, so that a restart examines nothing that is not due."""
    with start() as server:
        for name in ("useful", "other"):
            assert upload(server.client(ADMIN_KEY), name, adapters[name]).status_code == 201
    due, _ = sorted(place.store.glob("exam/verdicts/*/*.json"))
    due.write_text(json.dumps({**json.loads(due.read_text()), "at": 0.0}))
    with start(exam_every="1h") as one, start(exam_every="1h") as two:
        until(one, lambda: len([*one.engine.asked, *two.engine.asked]) == 64)
        one.portal.call(asyncio.sleep, 0.3)
        assert [*one.engine.asked, *two.engine.asked] == [due.stem] * 64
    with start(exam_every="1h") as server:
        server.portal.call(asyncio.sleep, 0.3)
        assert not server.engine.asked
    assert not lines(place), "what passes is no news"


class Served:
    """Adapters of a schedule, by the time of their last exam. asked: who was examined, and when."""

    def __init__(self, tmp_path: Path, **at: float) -> None:
        self.now, self.at, self.broken = 1000.0, at, set[str]()
        self.asked: list[tuple[str, float]] = []
        registry = {
            name: SimpleNamespace(name=name, log_fields={}, served=SimpleNamespace(key=name)) for name in at
        }
        exam = SimpleNamespace(
            found=lambda _: SimpleNamespace(at=1.0),
            found_again=lambda key: SimpleNamespace(at=self.at[key]),
        )
        again = SimpleNamespace(exam=exam, registry=registry, examine=self.examine, look=self.look)
        self.schedule = Schedule(cast(Again, again), tmp_path, 100.0, lambda: self.now)

    async def look(self) -> None:
        """Nothing is new."""

    async def examine(self, entry: Any) -> None:
        self.asked.append((entry.name, self.now))
        if entry.name in self.broken:
            raise ExamUnavailable("busy")
        self.at[entry.name] = self.now

    def run(self, *times: float) -> list[tuple[str, float]]:
        self.asked.clear()
        for self.now in times:
            assert asyncio.run(self.schedule._examine_one()) == len(self.at)
        return self.asked


def test_the_oldest_goes_first_and_only_what_is_due(tmp_path: Path) -> None:
    served = Served(tmp_path, a=950.0, b=890.0, c=899.0)
    assert served.run(1000.0, 1001.0, 1002.0, 1051.0) == [("b", 1000.0), ("c", 1001.0), ("a", 1051.0)]
    assert served.run(1060.0, 1101.0) == [("b", 1101.0)]


def test_examining_again_goes_on_after_whatever_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served, tries = Served(tmp_path, a=800.0), asyncio.Queue[int]()

    async def run() -> None:
        async def fails() -> int:
            await tries.put(1)
            raise RuntimeError("not expected")

        monkeypatch.setattr(served.schedule, "_examine_one", fails)
        monkeypatch.setattr(schedule, "_LONGEST_PAUSE_SECONDS", 0.0)
        work = asyncio.create_task(served.schedule.work())
        for _ in range(2):
            await asyncio.wait_for(tries.get(), 5)
        work.cancel()

    asyncio.run(run())
    assert "not examined again for now: RuntimeError: not expected" in caplog.text


def test_what_gave_no_score_waits(tmp_path: Path) -> None:
    served = Served(tmp_path, a=800.0, b=810.0)
    served.broken.add("a")
    assert served.run(1000.0, 1001.0, 1002.0, 1099.0, 1100.0) == [("a", 1000.0), ("b", 1001.0), ("a", 1100.0)]
