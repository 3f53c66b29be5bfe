"""What an API server tells the engine: ids, loads, and when weights are freed. No engine runs."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.lora.request import LoRARequest

from safelora_vllm.errors import GuardError, StoreUnavailable
from safelora_vllm.integration.seams import server as seams
from safelora_vllm.integration.server import engine as engine_side
from safelora_vllm.integration.server.engine import IDS_EACH, Pool, ask_workers
from tests.server.fake_engine import FakeEngine


class Names:
    """Deals out numbers as a store does."""

    def __init__(self) -> None:
        self.next = 1000
        self.reserved: list[int] = []

    def reserve_ids(self, count: int) -> int:
        self.reserved.append(count)
        first, self.next = self.next, self.next + count
        return first


def test_each_version_has_ids_of_its_own_and_the_store_is_asked_for_many_at_once() -> None:
    names = Names()
    pool = Pool(None, cast(Any, names))

    async def ids() -> list[int]:
        return [await pool.new_id() for _ in range(65)]

    assert asyncio.run(ids()) == [1000 + 16 * number for number in range(65)]
    assert names.reserved == [64 * 16] * 2
    assert IDS_EACH == 16


def test_a_copy_may_be_lost_as_often_as_there_are_ids() -> None:
    pool = Pool(None, cast(Any, None))
    for losses in range(IDS_EACH):
        request = pool.request("x", "k", 32)
        assert (request.lora_int_id, request.lora_name) == (32 + losses, "x")
        pool.mark_lost({request.lora_path})
    with pytest.raises(StoreUnavailable, match="copy of x was lost 16 times"):
        pool.request("x", "k", 32)
    assert pool.request("y", "other", 48).lora_int_id == 48


def running(*ids: int | None) -> dict[str, Any]:
    """vLLM's states of requests that use the adapters with these ids, all under one name."""
    return {
        str(number): SimpleNamespace(
            lora_request=None if lora_id is None else LoRARequest("x", lora_id, "safelora://k")
        )
        for number, lora_id in enumerate(ids)
    }


def test_requests_with_an_older_version_of_the_name_are_not_counted() -> None:
    engine = FakeEngine()
    engine.output_processor.request_states.update(running(16, None, 32, 16))
    for lora_id, count in ((16, 2), (32, 1), (48, 0)):
        assert seams.in_flight(engine, LoRARequest("x", lora_id, "safelora://k")) == count


def test_weights_are_freed_when_their_last_request_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine_side._DRAIN_POLL_SECONDS <= 1
    monkeypatch.setattr(engine_side, "_DRAIN_POLL_SECONDS", 0.001)
    request = LoRARequest("x", 16, "safelora://k")

    async def use() -> None:
        engine = FakeEngine()
        states = engine.output_processor.request_states
        states.update(running(16, 16))
        releasing = asyncio.create_task(Pool(engine, cast(Any, None)).release(request, lambda _: False))
        for _ in range(2):
            await asyncio.sleep(0.02)
            assert engine.removed == [] and not releasing.done()
            states.popitem()
        await releasing
        assert engine.removed == [16]

    asyncio.run(use())


def test_weights_that_are_wanted_again_are_not_freed() -> None:
    engine, request = FakeEngine(), LoRARequest("x", 16, "safelora://k")
    asyncio.run(Pool(engine, cast(Any, None)).release(request, request.__eq__))
    assert engine.removed == []


def test_a_dead_engine_has_nothing_to_free(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(_: int) -> bool:
        raise RuntimeError("the engine has ended")

    engine = FakeEngine()
    monkeypatch.setattr(engine, "remove_lora", fails)
    request = LoRARequest("x", 16, "safelora://k")
    asyncio.run(Pool(engine, cast(Any, None)).release(request, lambda _: False))


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError])
def test_workers_without_the_plugin_are_said_to_be(error: type[Exception]) -> None:
    engine = FakeEngine(lambda: [error("no attribute 'safelora_attest'")])
    with pytest.raises(GuardError, match="the workers have not loaded the safelora plugin"):
        asyncio.run(ask_workers(engine))
