"""/metrics of the live server."""

from __future__ import annotations

import time
from pathlib import Path

import httpx

from tests.server.conftest import load, metric_samples, say


def test_metrics_follow_the_adapters(
    admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path]
) -> None:
    load(admin, "measured", adapters["qv"])
    say(user, "measured")
    samples = metric_samples(user)
    report = user.get("/v1/adapters/measured").json()

    def value(name: str, **labels: str) -> float:
        return samples[name, frozenset(labels.items())]

    assert value("safelora_adapter_modules", adapter="measured", decision="projected") == 60
    similarities = [module["similarity"] for module in report["modules"]]
    assert value("safelora_adapter_similarity", adapter="measured", stat="min") == min(similarities)
    retained = [module["retained"] for module in report["modules"]]
    assert value("safelora_adapter_retained_norm", adapter="measured", stat="min") == min(retained)
    assert 0.29 < value("safelora_adapter_relative_norm", adapter="measured") < 0.31
    info = {"digest": report["digest"], "method": "safe-lora", "mode": "enforce"}
    info |= {"second_opinion": "false", "tenant": "", "version": "1"}
    assert value("safelora_adapter_info", adapter="measured", **info) == 1
    assert value("safelora_workers", state="guarded") == 1 == value("safelora_workers_expected")
    assert value("safelora_ready") == 1 and user.get("/safelora/ready").json() == {
        "ready": True,
        "problems": [],
        "warnings": [],
    }
    used = value("safelora_adapter_generation_tokens_total", adapter="measured")
    assert used == 8 and value("safelora_adapter_requests_total", adapter="measured", outcome="length") == 1
    assert value("safelora_adapter_prompt_tokens_total", adapter="measured") > 3
    for histogram in ("time_to_first_token", "time_per_output_token"):
        assert value(f"safelora_adapter_{histogram}_seconds_count", adapter="measured") == 1
        assert value(f"safelora_adapter_{histogram}_seconds_sum", adapter="measured") > 0
    assert value("safelora_max_gpu_lora_adapters", engine="0") == 2
    assert value("safelora_projector_bytes", tier="device") > 1e6
    assert value("safelora_enforcing") == 1
    assert any(name.startswith("vllm:") for name, _ in samples), "vLLM's own metrics are missing"

    misses = value("safelora_gate_cache_total", outcome="miss")
    admin.post("/v1/unload_lora_adapter", json={"lora_name": "measured"})
    load(admin, "again", adapters["qv"])
    samples = metric_samples(user)
    assert not any(("adapter", "measured") in labels for _, labels in samples)
    assert value("safelora_gate_cache_total", outcome="hit") >= 1
    assert value("safelora_gate_cache_total", outcome="miss") == misses


def test_streams_and_aborted_requests_are_counted(
    admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path]
) -> None:
    load(admin, "streamed", adapters["other"])
    body = {"model": "streamed", "prompt": "One two", "max_tokens": 8, "stream": True, "ignore_eos": True}
    assert user.post("/v1/completions", json=body).status_code == 200
    with user.stream("POST", "/v1/completions", json=body | {"max_tokens": 400}) as answer:
        next(answer.iter_lines())  # and then the client goes away

    def counted() -> dict[str, float]:
        return {
            dict(labels)["outcome"]: value
            for (name, labels), value in metric_samples(user).items()
            if name == "safelora_adapter_requests_total" and ("adapter", "streamed") in labels
        }

    for _ in range(100):
        if (found := counted())["abort"]:
            break
        time.sleep(0.1)
    assert (found["length"], found["abort"], found["error"]) == (1, 1, 0)


def test_mixes_of_adapters_do_not_pile_up(
    admin: httpx.Client, user: httpx.Client, adapters: dict[str, Path]
) -> None:
    """vLLM's own gauge has the names of all adapters in a step as a label."""
    for name in ("extra0", "extra1"):
        load(admin, name, adapters[name])
    mixes = set()
    for name in ("extra0", "extra1", "static", "extra0"):
        say(user, name)
        found = [
            dict(labels) for metric, labels in metric_samples(user) if metric == "vllm:lora_requests_info"
        ]
        assert len(found) == 1
        mixes.add(found[0]["running_lora_adapters"])
    assert mixes <= {"", "extra0", "extra1", "static"}
