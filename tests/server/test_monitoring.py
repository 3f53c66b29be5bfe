"""examples/monitoring: a real Prometheus scrapes the server; dashboards and alerts are asked of it.

The server's HTTP, routes and metrics are real and its engine is fake. Durations of rules are shortened, so
that an incident fires and resolves within seconds. Skipped where no Prometheus is installed (Debian:
prometheus).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from safelora_vllm.errors import GateUnavailable
from safelora_vllm.gate.metrics import GateMetrics
from safelora_vllm.integration.attestation import PoolState
from safelora_vllm.projectors.cache import ProjectorCache
from tests.server.conftest import ADMIN_KEY, upload, write_keys
from tests.server.fake_server import FakeServer, Place
from tests.server.prometheus import Prometheus, asked, needs_prometheus, operands, panels, promtool, scraping
from tests.tiny import Draft, lora

pytestmark = needs_prometheus
# Part of a query → why it has no answer at a server at work.
EMPTY = {
    'absent(up{job="safelora"})': "a server is scraped",
    'mode="report-only"': "adapters are projected",
    'method="none"': "adapters are projected",
    "_exam": "nobody asked for an exam",
    'second_opinion="true"': "no policy asks for one",
    "vllm:num_requests_waiting": "the engine is fake, and vLLM counts none",
}


class _Outputs:
    """What an engine gives for a request."""

    def __init__(self, tokens: int) -> None:
        self.outputs = [SimpleNamespace(index=0, token_ids=[0] * tokens, finish_reason="length")]
        self.finished, self.prompt_token_ids = True, [0] * 9
        self.metrics = SimpleNamespace(
            first_token_latency=0.2, first_token_ts=1.0, last_token_ts=2.0, num_generation_tokens=tokens
        )


class Monitored:
    """A server at work and the Prometheus that scrapes it. ``gate`` is the gate's own counters."""

    def __init__(self, fake: FakeServer, gate: GateMetrics, prometheus: Prometheus) -> None:
        self.fake, self.gate, self.prometheus = fake, gate, prometheus
        self.admin: Any = fake.client(ADMIN_KEY)

    def request(self, name: str | None) -> None:
        """One request through what counts an engine's requests."""

        async def run() -> None:
            from safelora_vllm.integration.server.accounting import counted

            async def outputs() -> Any:
                yield _Outputs(5)

            metrics = self.fake.app.state.safelora_metrics
            [output async for output in counted(outputs(), name, False, metrics.traffic)]

        self.fake.portal.call(run)


@pytest.fixture
def monitored(
    cache: ProjectorCache, drafts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Monitored]:
    """As `fake`, with a budget of the store."""
    monkeypatch.setenv("VLLM_PLUGINS", "safelora")
    monkeypatch.setenv("SAFELORA_ADMIN_API_KEY", ADMIN_KEY)
    with (
        Place.start(cache, tmp_path, select="all") as place,
        place.server(
            {"static": drafts["static"]}, keys=str(write_keys(place.keys)), store_bytes=10**9
        ) as fake,
    ):
        web = uvicorn.Server(uvicorn.Config(fake.app, "127.0.0.1", 0, lifespan="off", log_level="error"))
        serving = fake.portal.start_task_soon(web.serve)
        while not web.started:
            time.sleep(0.02)
        port = web.servers[0].sockets[0].getsockname()[1]
        try:
            with scraping(f"127.0.0.1:{port}", tmp_path / "prometheus") as prometheus:
                yield Monitored(fake, place.service._metrics, prometheus)
        finally:
            web.should_exit = True
            serving.result(20)


def test_the_rules_are_sound_and_fire_for_what_they_are_for() -> None:
    promtool("check", "rules", "safelora.yml")
    promtool("test", "rules", "tests.yml")


def test_the_metrics_are_as_prometheus_wants_them(fake: FakeServer, drafts: dict[str, Path]) -> None:
    upload(fake.client(ADMIN_KEY), "qv", drafts["qv"])  # type: ignore[arg-type]
    lines = fake.client().get("/metrics").text.splitlines(keepends=True)
    ours = "".join(line for line in lines if "safelora_" in line)
    assert not promtool("check", "metrics", text=ours)


def test_what_an_expression_compares() -> None:
    assert operands("max(a) < 0.9 * max(b)") == ["max(a)", "0.9 * max(b)"]
    assert operands("a unless on (instance) b") == ["a", "b"]
    assert operands('a{x!="y"} == 0 or b / ignoring (p) c > 7 * 86400') == ['a{x!="y"}', "b / ignoring (p) c"]


def test_dashboards_and_alerts_of_a_server_at_work(
    monitored: Monitored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, admin, prometheus = monitored.fake, monitored.admin, monitored.prometheus
    reconciler = fake.app.state.safelora
    made = [Draft(tensors=lora(seed=9 + seed)).write(tmp_path / f"used{seed}") for seed in range(2)]
    assert upload(admin, "acme/used", made[0]).status_code == 201
    assert upload(admin, "acme/used", made[1], replace=True).status_code == 201
    fake.app.state.safelora_metrics._sizes.count()

    def pools(steps: int) -> list[PoolState]:
        seconds = {"load_counts": [steps + 2, 0, 0, 0, 0, 0, 0], "load_seconds": 0.001}
        ids = [entry.served.request.lora_int_id for entry in reconciler.registry.values() if entry.served]
        return [
            PoolState(0, 2, 4, ids, ids, 2, steps, 0, steps, 0, **seconds)  # type: ignore[arg-type]
        ]

    steps = [0]

    def traffic() -> None:
        monitored.request("acme/used")
        monitored.request(None)
        reconciler.watchdog.pools = pools(steps[0])

    bad = Draft(tensors=lora(seed=3))
    bad.config["use_dora"] = True
    folder = bad.write(tmp_path / "bad")

    def work() -> None:
        traffic()
        monitored.gate.record_error("StoreUnavailable", "acme/used")
        assert upload(admin, "acme/again", made[1], replace=True).status_code in (200, 201)
        assert upload(admin, "acme/bad", folder).status_code == 422

    # Every panel, alert, recording rule and question has data, but for those that have none by design.
    queries = asked("acme/used", "acme")
    assert len(panels("", "")) > 20 and len(queries) > 80
    empty = {part: {query for query in queries if part in query} for part in EMPTY}
    assert all(empty.values())
    found = prometheus.empty(queries.keys() - set().union(*empty.values()), work)
    assert not found, {query: queries[query] for query in found}
    assert not [query for named in empty.values() for query in named if prometheus.ask(query)]
    prometheus.until(lambda: "SafeloraGateErrors" in prometheus.firing(), "errors of the gate", work)
    calm = prometheus.firing()
    work_alone = {"SafeloraRefusalsSpike", "SafeloraGateErrors"}
    assert calm <= {"SafeloraStoreNearlyFull", *work_alone}, "of the disk, or the work"
    calm -= work_alone

    # An incident: a worker loses its guard, the gate is silent, copies are damaged, pools are too small.
    incident = {
        "SafeloraWorkerUnguarded", "SafeloraNotReady", "SafeloraGateDown", "SafeloraAdapterWithdrawn",
        "SafeloraStepReads", "SafeloraRequestsUnavailable", "SafeloraRefusalsSpike",
    }  # fmt: skip

    def silent(**_: float) -> None:
        raise GateUnavailable("it is down")

    def troubles() -> None:
        traffic()
        steps[0] += 1
        reconciler.watchdog.withdrawn += 1
        fake.app.state.safelora_metrics.traffic.ended("acme/used", "unavailable")

    with monkeypatch.context() as patch:
        seen: set[str] = set()

        def refuse() -> None:
            troubles()
            for number in range(4):
                assert upload(admin, f"acme/bad{number}", folder).status_code == 422
            seen.update(prometheus.firing())

        prometheus.until(lambda: "SafeloraRefusalsSpike" in seen, "refusals", refuse)
        patch.setattr(reconciler.watchdog, "workers", {"guarded": 0, "unguarded": 1})
        patch.setattr(reconciler.copies.gate, "metrics", silent)

        def broken() -> None:
            troubles()
            seen.update(prometheus.firing())

        prometheus.until(lambda: incident <= seen, "the incident", broken)
    assert prometheus.ask('ALERTS{alertname="SafeloraGateDown"}')
    prometheus.until(lambda: prometheus.firing() <= calm, "it is over", traffic)
