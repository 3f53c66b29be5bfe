"""examples/monitoring: a real Prometheus scrapes the server; dashboards and alerts are asked of it.

The server's HTTP, routes and metrics are real and its engine is fake. Durations of rules are shortened, so
that an incident fires and resolves within seconds. Skipped where no Prometheus is installed (Debian:
prometheus).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

from safelora_vllm.errors import GateUnavailable
from safelora_vllm.integration.attestation import PoolState
from tests.server.conftest import ADMIN_KEY, upload
from tests.server.fake_server import FakeServer
from tests.tiny import Draft, lora

MONITORING = Path(__file__).parents[2] / "examples" / "monitoring"
RULES = MONITORING / "rules" / "safelora.yml"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "safelora.json").read_text())
WAIT = 60.0
pytestmark = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no prometheus and promtool in PATH: install Debian's package prometheus",
)


def promtool(*arguments: str, text: str | None = None, folder: Path = RULES.parent) -> str:
    done = subprocess.run(
        ["promtool", *arguments], input=text, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class _Outputs:
    """What an engine gives for a request."""

    def __init__(self, tokens: int) -> None:
        self.outputs = [SimpleNamespace(index=0, token_ids=[0] * tokens, finish_reason="length")]
        self.finished, self.prompt_token_ids = True, [0] * 9
        self.metrics = SimpleNamespace(
            first_token_latency=0.2, first_token_ts=1.0, last_token_ts=2.0, num_generation_tokens=tokens
        )


class Monitored:
    """A server at work and the Prometheus that scrapes it."""

    def __init__(self, fake: FakeServer) -> None:
        self.fake, self.http = fake, httpx.Client()
        self.admin: Any = fake.client(ADMIN_KEY)

    def ask(self, query: str) -> list[dict[str, Any]]:
        answer = self.http.get("/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", (query, answer)
        return list(answer["data"]["result"])

    def firing(self) -> set[str]:
        alerts = self.http.get("/api/v1/alerts").json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def until(self, true: Callable[[], bool], what: str, traffic: Callable[[], None] = lambda: None) -> None:
        deadline = time.monotonic() + WAIT
        while not true():
            assert time.monotonic() < deadline, (what, self.firing())
            traffic()
            time.sleep(0.3)

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
def monitored(fake: FakeServer, tmp_path: Path) -> Iterator[Monitored]:
    """Scraped each half second, with rules whose windows are seconds."""
    web = uvicorn.Server(uvicorn.Config(fake.app, "127.0.0.1", 0, lifespan="off", log_level="error"))
    serving = fake.portal.start_task_soon(web.serve)
    while not web.started:
        time.sleep(0.02)
    port = web.servers[0].sockets[0].getsockname()[1]
    folder = tmp_path / "prometheus"
    folder.mkdir()
    short = re.sub(r"for: \d+m", "for: 0s", re.sub(r"\[(5m|15m)\]", "[5s]", RULES.read_text()))
    (folder / "rules.yml").write_text(short.replace("> 0.01'", "> 0'").replace("[1d]", "[20s]"))
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 500ms, evaluation_interval: 500ms}\nrule_files: [rules.yml]\n"
        f"scrape_configs: [{{job_name: safelora, static_configs: [{{targets: ['127.0.0.1:{port}']}}]}}]\n"
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}", "--web.listen-address=127.0.0.1:0",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    made = Monitored(fake)
    try:
        deadline = time.monotonic() + WAIT
        while not (found := re.search(r"Listening on.*?127\.0\.0\.1:(\d+)", (folder / "log").read_text())):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        made.http = httpx.Client(base_url=f"http://127.0.0.1:{found[1]}")
        yield made
    finally:
        process.terminate()
        process.wait(20)
        made.http.close()
        web.should_exit = True
        serving.result(20)


def test_the_rules_are_sound_and_fire_for_what_they_are_for() -> None:
    promtool("check", "rules", RULES.name)
    promtool("test", "rules", "tests.yml")


def test_the_metrics_are_as_prometheus_wants_them(fake: FakeServer, drafts: dict[str, Path]) -> None:
    upload(fake.client(ADMIN_KEY), "qv", drafts["qv"])  # type: ignore[arg-type]
    lines = fake.client().get("/metrics").text.splitlines(keepends=True)
    ours = "".join(line for line in lines if "safelora_" in line)
    assert not promtool("check", "metrics", text=ours)


def panels() -> list[tuple[str, list[str]]]:
    def filled(query: str) -> str:
        return query.replace("$adapter", "acme/used").replace("$tenant", "acme")

    found = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
    return [(p["title"], [filled(target["expr"]) for target in p["targets"]]) for p in found]


def test_dashboards_and_alerts_of_a_server_at_work(
    monitored: Monitored, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, admin = monitored.fake, monitored.admin
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

    # Every panel has data.
    assert len(panels()) > 20
    empty: list[str] = []

    def all_there() -> bool:
        empty[:] = [
            title
            for title, queries in panels()
            for query in queries
            if not monitored.ask(re.sub(r"\[(5m|15m|1h)\]", "[10s]", query))
        ]
        return not empty

    def work() -> None:
        traffic()
        assert upload(admin, "acme/again", made[1], replace=True).status_code == 201
        assert upload(admin, "acme/bad", folder).status_code == 422

    try:
        monitored.until(all_there, "panels", work)
    except AssertionError as error:
        raise AssertionError(f"panels without data: {empty}") from error
    assert monitored.ask("up") and monitored.ask('safelora_lora_adapter_loaded{level="gpu"}')
    calm = monitored.firing()
    assert calm <= {"SafeloraStoreNearlyFull", "SafeloraRefusalsSpike"}, "of the disk, or the work"
    calm -= {"SafeloraRefusalsSpike"}

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
            seen.update(monitored.firing())

        monitored.until(lambda: "SafeloraRefusalsSpike" in seen, "refusals", refuse)
        patch.setattr(reconciler.watchdog, "workers", {"guarded": 0, "unguarded": 1})
        patch.setattr(reconciler.copies.gate, "metrics", silent)

        def broken() -> None:
            troubles()
            seen.update(monitored.firing())

        monitored.until(lambda: incident <= seen, "the incident", broken)
    assert monitored.ask('ALERTS{alertname="SafeloraGateDown"}')
    monitored.until(lambda: monitored.firing() <= calm, "it is over", traffic)
