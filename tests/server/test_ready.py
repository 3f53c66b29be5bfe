"""GET /safelora/ready, and what a scrape says of a server with a fake engine."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from safelora_vllm.errors import GateUnavailable
from safelora_vllm.integration.server.accounting import counted
from safelora_vllm.integration.server.traffic import TrafficTable
from tests.server.conftest import metric_samples
from tests.server.fake_server import FakeServer


def test_a_server_is_ready(fake: FakeServer) -> None:
    """Without a key: probes have none."""
    answer = fake.client().get("/safelora/ready")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "problems": []})
    samples = metric_samples(fake.client())  # type: ignore[arg-type]  # a client of the same methods
    assert samples["safelora_ready", frozenset()] == 1
    assert samples["safelora_workers", frozenset({("state", "guarded")})] == 1


def test_what_makes_it_not_ready(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    reconciler = fake.app.state.safelora

    def problems() -> list[str]:
        answer = fake.client().get("/safelora/ready")
        assert answer.status_code == (503 if answer.json()["problems"] else 200)
        return list(answer.json()["problems"])

    with monkeypatch.context() as patch:
        patch.setattr(reconciler.watchdog, "workers", {"guarded": 0, "unguarded": 1})
        assert problems() == ["0 of all workers are guarded"]
        samples = metric_samples(fake.client())  # type: ignore[arg-type]
        assert samples["safelora_ready", frozenset()] == 0
    with monkeypatch.context() as patch:
        patch.setattr(fake.app.state.safelora_metrics, "_expected", 2)
        assert problems() == ["1 of 2 workers are guarded"]
    with monkeypatch.context() as patch:

        def silent(**_: float) -> None:
            raise GateUnavailable("no answer")

        patch.setattr(reconciler.copies.gate, "state", silent)
        (problem,) = problems()
        assert problem.startswith("the gate does not answer")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
        assert problems() == ["the adapter store is not writable"]
    assert not problems() and not list(fake.store.glob(f".ready-{os.getpid()}"))


def test_requests_for_what_cannot_be_served(fake: FakeServer) -> None:
    """They never reach the engine; the row ends with the adapter."""
    table: TrafficTable = fake.app.state.safelora_metrics.traffic
    served = fake.app.state.openai_serving_models.lora_requests
    entry = fake.app.state.safelora.registry["static"]
    fake.app.state.safelora.registry["static"] = type(entry)("static", 1)
    with pytest.raises(Exception, match="being prepared"):
        served["static"]
    assert table.snapshot()["static"].requests["unavailable"] == 1
    del fake.app.state.safelora.registry["static"]
    fake.app.state.safelora_metrics.count_now()
    assert "static" not in table.snapshot()


class _Output:
    """As vLLM's ``RequestOutput``."""

    def __init__(self, tokens: int, finished: bool = False, reason: str | None = None) -> None:
        completion = SimpleNamespace(index=0, token_ids=[0] * tokens, finish_reason=reason)
        self.outputs, self.finished, self.prompt_token_ids = [completion], finished, [1, 2, 3]
        self.metrics = SimpleNamespace(
            first_token_latency=0.5, first_token_ts=1.0, last_token_ts=2.0, num_generation_tokens=5
        )


async def _outputs(*outputs: _Output, error: bool = False):  # type: ignore[no-untyped-def]
    for output in outputs:
        yield output
    if error:
        raise RuntimeError("the engine")


async def _all(delta: bool, table: TrafficTable) -> None:
    sizes = (2, 3) if delta else (2, 5)
    given = _outputs(_Output(sizes[0]), _Output(sizes[1], True, "length"))
    found = [output async for output in counted(given, "a", delta, table)]
    assert len(found) == 2


def test_what_outputs_are_counted_as(tmp_path: Path) -> None:
    table = TrafficTable(tmp_path)
    table.serve("a")
    for delta in (True, False):
        asyncio.run(_all(delta, table))

    async def fails() -> None:
        with pytest.raises(RuntimeError):
            [o async for o in counted(_outputs(_Output(1), error=True), "a", True, table)]

    async def is_left() -> None:
        left = counted(_outputs(_Output(4), _Output(1, True, "stop")), "a", True, table)
        await anext(left)
        await left.aclose()

    asyncio.run(fails())
    asyncio.run(is_left())
    found = table.snapshot()["a"]
    assert found.requests == {"stop": 0, "length": 2, "abort": 1, "error": 1, "unavailable": 0}
    assert (found.prompt_tokens, found.generation_tokens) == (12, 15)
    assert found.first_token.mean == 0.5 and found.each_token.mean == 0.25
    table.close()
