"""GET /safelora/ready, and what a scrape says of a server with a fake engine."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from safelora_vllm.errors import GateUnavailable
from safelora_vllm.integration.server import accounting, readiness
from safelora_vllm.integration.server.accounting import counted
from safelora_vllm.integration.server.one_at_a_time import OneAtATime
from safelora_vllm.integration.server.traffic import BASE, OTHERS, TrafficTable
from tests.server.conftest import samples_of
from tests.server.fake_server import FakeServer, Place


@pytest.fixture
def asked_anew(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is kept."""
    look_anew(fake, monkeypatch)


def look_anew(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = server.app.state.safelora_metrics.readiness
    for look in (ready._outside, ready._keys):
        monkeypatch.setattr(look, "_kept", 0.0)


@pytest.mark.parametrize("query", ["", "?strict=true"])
def test_a_server_is_ready(fake: FakeServer, query: str) -> None:
    """Without a key: probes have none."""
    answer = fake.client().get(f"/safelora/ready{query}")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "problems": [], "warnings": []})
    samples = samples_of(fake.client().get("/metrics").text)
    assert samples["safelora_ready", frozenset()] == 1
    assert samples["safelora_workers", frozenset({("state", "guarded")})] == 1


@pytest.mark.usefixtures("asked_anew")
def test_what_makes_it_not_ready(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Served adapters need guarded workers. Changes need gate and store, which count in the strict answer."""
    reconciler = fake.app.state.safelora

    def problems(found: str = "problems") -> list[str]:
        answer, strict = (fake.client().get(f"/safelora/ready{q}") for q in ("", "?strict=true"))
        assert answer.status_code == (503 if answer.json()["problems"] else 200)
        both = answer.json()["problems"] + answer.json()["warnings"]
        assert (strict.status_code, strict.json()["problems"]) == (503 if both else 200, both)
        samples = samples_of(fake.client().get("/metrics").text)
        assert samples["safelora_ready", frozenset()] == (not both), "alerts are of both"
        assert (found == "warnings") is not bool(answer.json()["problems"]) or not both
        return list(answer.json()[found])

    with monkeypatch.context() as patch:
        patch.setattr(reconciler.watchdog, "workers", {"guarded": 0, "unguarded": 1})
        assert problems() == ["0 of all workers are guarded"]
    with monkeypatch.context() as patch:
        patch.setattr(fake.app.state.safelora_metrics.readiness, "_expected", 2)
        assert problems() == ["1 of 2 workers are guarded"]
    with monkeypatch.context() as patch:

        def silent(**_: float) -> None:
            raise GateUnavailable("no answer")

        patch.setattr(reconciler.copies.gate, "state", silent)
        (problem,) = problems("warnings")
        assert problem.startswith("the gate does not answer")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
        assert problems("warnings") == ["the adapter store is not writable"]
    with monkeypatch.context() as patch:
        patch.setattr(reconciler.names, "is_out", True)
        assert problems("warnings") == ["the store's bucket does not answer: changes answer 503"]
    assert not problems() and not list(fake.store.glob(f".ready-{os.getpid()}"))


def test_a_keys_file_gone_wrong_is_a_warning_and_a_metric(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    place.tenant()
    with place.server(keys=str(place.keys)) as server:
        look_anew(server, monkeypatch)
        http = server.client()
        assert http.get("/safelora/ready?strict=true").status_code == 200
        assert samples_of(http.get("/metrics").text)["safelora_keys_current", frozenset()] == 1
        place.keys.write_text("[tenants")
        assert http.get("/safelora/ready").json() == {
            "ready": True,
            "problems": [],
            "warnings": ["the keys file cannot be used: keys that were removed from it still work"],
        }
        samples = samples_of(http.get("/metrics").text)
        assert samples["safelora_keys_current", frozenset()] == samples["safelora_ready", frozenset()] == 0
        goes_on, check = threading.Event(), server.app.state.safelora_metrics.readiness
        monkeypatch.setattr(check._outside, "_seconds", 0.2)
        monkeypatch.setattr(readiness, "_writable", lambda _: goes_on.wait(30))
        first, second = http.get("/safelora/ready").json()["warnings"]
        goes_on.set()
        assert (first, second[:30]) == (readiness.SILENT, "the keys file cannot be used: "), "both are said"


def test_a_keys_file_whose_disk_hangs_is_a_warning(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, check = threading.Event(), fake.app.state.safelora_metrics.readiness
    look_anew(fake, monkeypatch)
    monkeypatch.setattr(check._keys, "_seconds", 0.2)
    monkeypatch.setattr(check, "_keys_current", lambda: goes_on.wait(30))
    answer = fake.client().get("/safelora/ready").json()
    goes_on.set()
    assert (answer["ready"], answer["warnings"]) == (True, [readiness._SILENT_KEYS])


def test_a_server_without_a_keys_file_has_no_metric_of_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    with place.server() as server:
        samples = samples_of(server.client().get("/metrics").text)
        assert not any(name == "safelora_keys_current" for name, _ in samples)


@pytest.mark.usefixtures("asked_anew")
def test_a_store_that_hangs_takes_one_thread(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many strangers ask, whether it is ready and for metrics."""
    reconciler, goes_on, looks = fake.app.state.safelora, threading.Event(), []

    def hangs(_: object) -> bool:
        looks.append(threading.current_thread())
        return goes_on.wait(30)

    monkeypatch.setattr(readiness, "_writable", hangs)
    monkeypatch.setattr(reconciler.names, "all", lambda: hangs(0) and {})
    metrics = fake.app.state.safelora_metrics
    for work in (metrics.readiness._outside, metrics._outside):
        monkeypatch.setattr(work, "_seconds", 0.2)
    for _ in range(20):
        answer = fake.client().get("/safelora/ready")
        assert (answer.status_code, answer.json()["warnings"]) == (200, [readiness.SILENT])
        assert fake.client().get("/safelora/ready?strict=true").status_code == 503
        assert "safelora_ready 0" in fake.client().get("/metrics").text
    goes_on.set()
    assert len(looks) == 2 and all("asyncio" not in thread.name for thread in looks)


def test_one_look_answers_all_who_ask() -> None:
    looks = []

    def look() -> int:
        time.sleep(0.05)
        looks.append(1)
        return len(looks)

    async def many() -> None:
        work = OneAtATime(look, 5.0, kept=5.0)
        assert set(await asyncio.gather(*(work.answer() for _ in range(50)))) == {1}
        assert await work.answer() == 1, "it is kept"

    asyncio.run(many())


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


def test_an_output_that_cannot_be_counted_ends_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one of a later vLLM."""
    table, given = TrafficTable(tmp_path), [object(), object()]

    async def use() -> None:
        assert [output async for output in counted(_outputs(*given), "a", True, table)] == given

    accounting._say_once.cache_clear()
    for _ in range(3):
        asyncio.run(use())
    assert caplog.text.count("requests are not counted in full") == 1
    assert table.snapshot()["a"].requests["stop"] == 3
    table.close()


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


def test_scrapes_and_calls_may_look_at_other_servers_counters_at_once(tmp_path: Path) -> None:
    """Files of other API servers come and go meanwhile."""
    table, end = TrafficTable(tmp_path), threading.Event()

    def looks(look: Callable[[], object]) -> None:
        while not end.is_set():
            look()

    with ThreadPoolExecutor(4) as pool:
        looking = [pool.submit(looks, look) for look in (table.snapshot, lambda: table.of("a")) * 2]
        for _ in range(60):
            others = [TrafficTable(tmp_path, max_rows=2) for _ in range(3)]
            others[0].ended("a", "stop")
            for other in others:
                other.close()
        end.set()
        for each in looking:
            each.result()
    assert table.snapshot().keys() == {BASE, OTHERS}


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
