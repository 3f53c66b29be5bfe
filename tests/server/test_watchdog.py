"""What an API server process notices of its workers and published copies. No server runs."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.lora.request import LoRARequest

from safelora_vllm.errors import GuardError, SafeLoRAError, StoreUnavailable
from safelora_vllm.integration.attestation import Attestation
from safelora_vllm.integration.server import watchdog
from safelora_vllm.integration.server.engine import Pool
from safelora_vllm.integration.server.exam.no_exam import NoExam
from safelora_vllm.integration.server.registry import Entry, Served
from safelora_vllm.integration.server.watchdog import Watchdog
from safelora_vllm.policy import Policy
from safelora_vllm.report import Report


class Place:
    """Two served adapters. answer: what the workers say. states: what their copies' files look like."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer: list[list[str]] | Exception = [[], []]  # of each worker: copies that it could not read
        self.asked = 0
        self.states: dict[str, Any] = {"k1": ("as it was",), "k2": ("as it was",)}
        report = Report("", "d", "p", Policy(), True, [], [])
        self.registry = {
            name: Entry(name, 1, served=Served(LoRARequest(name, number, f"safelora://k{number}"), report))
            for number, name in enumerate(("one", "two"), start=1)
        }
        self.pool = Pool(None, cast(Any, None))
        copies = cast(Any, SimpleNamespace(file_states=self.states.__getitem__, exam=NoExam()))
        self.watchdog = Watchdog(self.registry, copies, self.pool, self.put, guarded=2)
        monkeypatch.setattr(watchdog, "ask_workers", self.ask)
        self.look()  # it sees the files for the first time, and is alert for a while
        self.look(watchdog._ALERT_LOOKS)

    def put(self, entry: Entry) -> None:
        self.registry[entry.name] = entry

    async def ask(self, _: object) -> list[Attestation]:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return [Attestation(True, "socket", "p", "q", lost) for lost in self.answer]

    def look(self, times: int = 1) -> int:
        """Look so often; how often the workers were asked."""

        async def looks() -> None:
            for _ in range(times):
                await self.watchdog.look()

        before = self.asked
        asyncio.run(looks())
        return self.asked - before

    def problems(self) -> dict[str, SafeLoRAError | None]:
        return {name: entry.problem for name, entry in self.registry.items() if entry.served is None}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(monkeypatch)


def test_workers_are_asked_now_and_then_and_at_each_look_after_a_copy_changed(place: Place) -> None:
    assert place.look(10 * watchdog._ATTEST_LOOKS) == 10
    place.states["k2"] = ()
    assert place.look(watchdog._ALERT_LOOKS) == watchdog._ALERT_LOOKS
    assert place.look(10 * watchdog._ATTEST_LOOKS) == 10
    assert not place.problems(), "a worker that has the weights in memory does not mind"


def test_an_adapter_that_a_worker_could_not_read_is_withdrawn(place: Place) -> None:
    place.states["k1"] = ()
    place.answer = [[], ["safelora://k1"]]
    place.look()
    assert place.watchdog.workers == {"guarded": 2, "unguarded": 0}
    (problem,) = place.problems().values()
    assert isinstance(problem, StoreUnavailable) and "copy of one was damaged" in str(problem)
    again = place.pool.request("one", "k1", 16)
    assert again.lora_path == "safelora://k1/1", "no cached block is used again"
    assert again.lora_int_id == 17, "the pool has zeros under the id before"
    other = place.pool.request("two", "k2", 32)
    assert (other.lora_path, other.lora_int_id) == ("safelora://k2", 32)
    place.pool.mark_lost({again.lora_path})
    third = place.pool.request("one", "k1", 16)
    assert (third.lora_path, third.lora_int_id) == ("safelora://k1/2", 18)


def test_nothing_is_served_while_a_worker_is_not_guarded(place: Place) -> None:
    place.answer = GuardError("a worker answers nothing")
    place.look(watchdog._ATTEST_LOOKS)
    assert place.watchdog.workers == {"guarded": 0, "unguarded": 1}
    assert {name: str(problem) for name, problem in place.problems().items()} == dict.fromkeys(
        ("one", "two"), "a worker answers nothing"
    )


def test_figures_that_fail_keep_no_unguarded_worker(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise RuntimeError("vLLM has no such figure")

    place.watchdog.also = fails
    place.answer = GuardError("a worker answers nothing")
    place.look(watchdog._ATTEST_LOOKS)
    assert set(place.problems()) == {"one", "two"} and "no such figure" in caplog.text


def test_an_entry_that_was_changed_meanwhile_is_left_alone(place: Place) -> None:
    old = place.registry["one"]
    new = Entry("one", 16, served=old.served)

    def states(_: str) -> tuple[str]:
        place.registry["one"] = new
        return ("changed",)

    place.watchdog._copies = cast(Any, SimpleNamespace(file_states=states, exam=NoExam()))
    place.look()
    assert place.registry["one"] is new
