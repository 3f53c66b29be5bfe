"""A real Prometheus that scrapes a server, with what examples/monitoring asks of it.

Its rules have windows of seconds instead of minutes.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from safelora_vllm.metric_table import METRICS

MONITORING = Path(__file__).parents[2] / "examples" / "monitoring"
RULES = MONITORING / "rules" / "safelora.yml"
DASHBOARD = json.loads((MONITORING / "grafana" / "dashboards" / "safelora.json").read_text())
WAIT = 60.0
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no prometheus and promtool in PATH: install Debian's package prometheus",
)
_SPLIT = re.compile(r"\s(?:and|or|unless on \(\w+\)|[<>]=?|[!=]=)\s")
_NUMBER = re.compile(r"[\d.e*\s-]+")


@dataclass
class Prometheus:
    """A running one."""

    http: httpx.Client

    def ask(self, query: str) -> list[dict[str, Any]]:
        answer = self.http.get("/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", (query, answer)
        return list(answer["data"]["result"])

    def firing(self) -> set[str]:
        alerts = self.http.get("/api/v1/alerts").json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}

    def until(self, true: Callable[[], bool], what: str, traffic: Callable[[], None] = lambda: None) -> None:
        """Wait for it, with traffic meanwhile."""
        deadline = time.monotonic() + WAIT
        while not true():
            assert time.monotonic() < deadline, (what, self.firing())
            traffic()
            time.sleep(0.3)

    def empty(self, queries: Iterable[str], traffic: Callable[[], None]) -> set[str]:
        """Which of the queries have no answer, after all that is needed was waited for."""
        left, deadline = {query: shortened(query) for query in queries}, time.monotonic() + WAIT
        while left and time.monotonic() < deadline:
            traffic()
            left = {query: short for query, short in left.items() if not self.ask(short)}
            time.sleep(0.3)
        return set(left)


@contextmanager
def scraping(target: str, folder: Path) -> Iterator[Prometheus]:
    """One that scrapes ``host:port`` each half second, with the rules of examples/monitoring."""
    folder.mkdir()
    short = re.sub(r"for: \d+m", "for: 0s", re.sub(r"\[(5m|15m)\]", "[5s]", RULES.read_text()))
    (folder / "rules.yml").write_text(short.replace("> 0.01'", "> 0'").replace("[1d]", "[20s]"))
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 500ms, evaluation_interval: 500ms}\nrule_files: [rules.yml]\n"
        f"scrape_configs: [{{job_name: safelora, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}", "--web.listen-address=127.0.0.1:0",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + WAIT
        while not (found := re.search(r"Listening on.*?127\.0\.0\.1:(\d+)", (folder / "log").read_text())):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=30) as http:
            yield Prometheus(http)
    finally:
        process.terminate()
        process.wait(20)


def promtool(*arguments: str, text: str | None = None) -> str:
    """What promtool says, in the folder of the rules."""
    done = subprocess.run(
        ["promtool", *arguments], input=text, cwd=RULES.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def shortened(query: str) -> str:
    """With windows of seconds."""
    return re.sub(r"\[(5m|15m|1h|1d)\]", "[10s]", query)


def operands(expression: str) -> list[str]:
    """What an expression compares, each by itself: a comparison leaves out most answers."""
    return [part for part in _SPLIT.split(expression) if not _NUMBER.fullmatch(part)]


def panels(adapter: str, tenant: str) -> list[tuple[str, list[str]]]:
    """Title and queries of each panel of the dashboard, for an adapter and a tenant."""
    return [
        (
            panel["title"],
            [t["expr"].replace("$adapter", adapter).replace("$tenant", tenant) for t in panel["targets"]],
        )
        for panel in DASHBOARD["panels"]
        if panel["type"] != "row"
    ]


def asked(adapter: str, tenant: str) -> dict[str, list[str]]:
    """Query → what asks it: panels, alerts, recording rules, questions of docs/metrics.md."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    found: dict[str, list[str]] = {}
    for title, queries in panels(adapter, tenant):
        for query in queries:
            found.setdefault(query, []).append(f"panel {title}")
    for rule in rules:
        name = f"alert {rule['alert']}" if "alert" in rule else f"record {rule['record']}"
        for query in operands(rule["expr"]):
            found.setdefault(query, []).append(name)
    for question, query in [each for metric in METRICS for each in metric.queries]:
        for part in operands(query):
            found.setdefault(part, []).append(f"question {question}")
    return found
