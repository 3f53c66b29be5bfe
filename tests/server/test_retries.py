"""An adapter that cannot be served is tried again more and more seldom, and logged when its cause changes."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from safelora_vllm.errors import ExamUnavailable, GateUnavailable, SafeLoRAError
from safelora_vllm.integration.server.overdue import Overdue
from safelora_vllm.integration.server.reconcile import Reconciler
from safelora_vllm.integration.server.retries import Retries
from tests.server.fake_engine import FakeEngine
from tests.server.test_reconcile_duties import Gated, run, settle


def test_pauses_double_until_the_cause_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    retries, pauses = Retries(), []
    assert retries.is_due("x")
    for attempt in range(7):
        assert retries.failed("x", "the disk is full") is (attempt == 0), "logged once"
        pauses.append(next(s for s in range(100) if retries._failures["x"].due <= now + s))
        now += pauses[-1]
        assert retries.is_due("x")
    assert pauses == [0, 2, 4, 8, 16, 30, 30]
    assert retries.failed("x", "the gate is down") and retries.is_due("x")
    retries.failed("x", "the gate is down")
    assert not retries.is_due("x") and retries.is_due("another")
    assert retries.served("x") and not retries.served("x") and retries.is_due("x")
    retries.failed("y", "gone")
    retries.keep({"z"})
    assert not retries.served("y")


@pytest.mark.parametrize("error", [GateUnavailable("down"), ExamUnavailable("no score")])
def test_what_is_served_by_former_rules_is_not_so_for_long(
    error: SafeLoRAError, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its author may keep the engine, or the gate, too busy."""

    async def test(made: Reconciler, copies: Gated, _: FakeEngine) -> None:
        now = time.monotonic()
        made._overdue = Overdue(lambda: now)
        await made.sync()
        await settle()
        assert made.registry["chat"].served
        copies.rules, copies.answer = "others", error
        for _number in range(2):
            made._prepare_again()
            await settle()
            assert made.registry["chat"].served
            now += 899
        now -= 899
        assert f"cannot be judged now, and is served as before: {error}" in caplog.text
        now += 1
        made._prepare_again()
        assert made.registry["chat"].served is None and made.watchdog.withdrawn == 1
        assert "'chat' is withdrawn: it could not be judged by the rules of today for 15 min" in caplog.text
        copies.answer, copies.rules = None, "r"
        await made.prepare("chat")
        assert made.registry["chat"].served

    run(tmp_path, test)


def test_what_is_overdue() -> None:
    now = 100.0
    overdue = Overdue(lambda: now)
    overdue.failed("old")
    assert not overdue.look([], scored=-math.inf)
    now = 5000.0
    assert not overdue.look(["one", "two", "old"], scored=-math.inf), "a failure of other rules is forgotten"
    overdue.failed("one")
    now = 5899.0
    overdue.judged("another")
    assert not overdue.look(["one", "two", "old"], scored=-math.inf)
    now = 5900.0
    assert overdue.look(["one", "two", "old"], scored=-math.inf) == ["one"], "the others wait their turn"
    overdue.judged("one")
    now = 6799.5
    assert not overdue.look(["two"], scored=-math.inf)
    now = 6800.0
    assert not overdue.look(["two"], scored=5901.0), "an exam gives scores"
    assert overdue.look(["two", "new"], scored=-math.inf) == ["two"], "nothing was judged for as long"


def test_the_log_has_one_line_for_a_cause(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(made: Reconciler, copies: Gated, _: FakeEngine) -> None:
        copies.answer = GateUnavailable("the gate is down")
        await made.sync()
        await settle()
        for _number in range(20):
            made._prepare_again()
            await settle()
        assert caplog.text.count("cannot be served now: the gate is down") == 1
        assert len(copies.asked) == 2, "then it waits"
        copies.answer = None
        await made.prepare("chat")
        assert made.registry["chat"].served is not None, "whoever asks for it does not wait"
        assert "could be judged again" in caplog.text

    caplog.set_level(logging.INFO, "vllm.safelora")
    run(tmp_path, test)


def test_a_burst_of_requests_asks_the_gate_twice(tmp_path: Path) -> None:
    """All wait behind one lock; a try that fails is not repeated by each of them before its turn."""

    async def test(made: Reconciler, copies: Gated, _: FakeEngine) -> None:
        await made.sync()
        await settle()
        copies.asked.clear()
        made.served.put(replace(made.registry["chat"], served=None, problem=None))
        copies.answer = GateUnavailable("the gate is down")
        for _number in range(20):
            made.wake("chat")
        await settle()
        await settle()
        assert len(copies.asked) == 2

    run(tmp_path, test)
