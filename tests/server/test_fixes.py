"""Bugs of vLLM that we mend, where it takes no engine to show them.

Each has a test that fails when vLLM has mended it: then the fix can go. docs/compatibility.md says which.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from prometheus_client import CollectorRegistry, Gauge
from vllm.lora.request import LoRARequest
from vllm.v1.core import kv_cache_utils
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

from safelora_vllm.errors import SafeLoRAError
from safelora_vllm.integration.plugin import register
from safelora_vllm.integration.seams import checks
from safelora_vllm.integration.seams.fixes import FIXES, SWITCH
from safelora_vllm.integration.seams.fixes.fix import original
from safelora_vllm.integration.seams.fixes.mixes import LatestLabelsGauge, with_latest_labels
from safelora_vllm.integration.seams.fixes.prefix_cache import PREFIX_CACHE, with_path
from safelora_vllm.integration.seams.fixes.ranks import load_on_all_ranks, load_on_rank

WHAT_IS_REPLACED = """
from safelora_vllm.integration.plugin import register
from safelora_vllm.integration.seams.fixes import fix
register()
register()
print("replaced:", *(name for _, name in fix._originals))
"""
WORKS, FAILS = WorkerProc.ResponseStatus.SUCCESS, WorkerProc.ResponseStatus.FAILURE


def keys_of_two_versions() -> list[Any]:
    """What vLLM hashes into the first block of a prompt, for two versions of one adapter."""
    keys = []
    for number, path in enumerate(("safelora://old", "safelora://new")):
        request: Any = SimpleNamespace(
            lora_request=LoRARequest("tenant", 1 + number, path),
            mm_features=[], cache_salt=None, prompt_embeds=None,
        )  # fmt: skip
        keys.append(kv_cache_utils.generate_block_hash_extra_keys(request, 0, 16, 0)[0])
    return keys


def test_blocks_of_the_prefix_cache_belong_to_one_version() -> None:
    register()
    old, new = keys_of_two_versions()
    assert old != new


def test_the_path_stands_behind_vllms_keys() -> None:
    keys = with_path(lambda request: ["tenant"] if request.lora_request else [])
    assert keys(SimpleNamespace(lora_request=None)) == [], "the base model's blocks are as they were"
    lora = LoRARequest("tenant", 1, "safelora://a")
    assert keys(SimpleNamespace(lora_request=lora)) == ["tenant", "safelora://a"]


def test_vllm_still_looks_blocks_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the first version that does not is another than the fix says."""
    name = "_gen_lora_extra_hash_keys"
    monkeypatch.setattr(kv_cache_utils, name, original(kv_cache_utils, name))
    old, new = keys_of_two_versions()
    assert PREFIX_CACHE.fixed_in is not None
    assert (old == new) == (checks.release() < PREFIX_CACHE.fixed_in)


def series_after_two_mixes(wrap: Any) -> list[str]:
    """What runs, by the series of vLLM's gauge after two steps with other adapters."""
    registry = CollectorRegistry()
    labels = ["max_lora", "waiting_lora_adapters", "running_lora_adapters"]
    logger = MagicMock(max_lora=1, **{f"labelname_{label}": label for label in labels})
    logger.gauge_lora_info = wrap(Gauge("lora_requests_info", "…", labels, registry=registry))
    for name in ("first", "second"):
        PrometheusStatLogger.record(logger, SchedulerStats(running_lora_adapters={name: 1}), None)
    return [
        sample.labels["running_lora_adapters"] for metric in registry.collect() for sample in metric.samples
    ]


def test_the_newest_mix_is_kept() -> None:
    assert series_after_two_mixes(LatestLabelsGauge) == ["second"]


def test_vllm_still_keeps_every_mix() -> None:
    """Fails when vLLM removes old series: then the fix can go."""
    assert series_after_two_mixes(lambda gauge: gauge) == ["first", "second"]


@pytest.mark.parametrize(
    ("gauge", "shared", "wrapped"), [("a gauge", False, True), ("a gauge", True, False), (None, False, False)]
)
def test_which_gauges_keep_their_newest_mix_only(
    gauge: str | None, shared: bool, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of several API servers, whose series are in shared files, and none that is not there."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/metrics")
    if not shared:
        monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR")

    def init(self: Any, given: str | None) -> None:
        self.gauge_lora_info = given

    logger = SimpleNamespace()
    with_latest_labels(init)(logger, gauge)
    assert isinstance(logger.gauge_lora_info, LatestLabelsGauge) == wrapped
    assert wrapped or logger.gauge_lora_info == gauge


class Queue:
    """One rank's answers."""

    def __init__(self, *answers: tuple[Any, Any]) -> None:
        self.answers = deque(answers)

    def dequeue(self, **_: Any) -> tuple[Any, Any]:
        return self.answers.popleft()


def executor(*ranks: Queue) -> Any:
    """vLLM's executor over ranks that have answered already; keeps the names of what they were asked."""
    made: Any = MultiprocExecutor.__new__(MultiprocExecutor)
    made.asked = []
    made.rpc_broadcast_mq = SimpleNamespace(enqueue=lambda question: made.asked.append(question[0]))
    made.response_mqs, made.futures_queue, made.is_failed = list(ranks), deque(), False
    return made


def test_ranks_load_an_adapter_or_none_does() -> None:
    request = LoRARequest("tenant", 7, "safelora://a")
    loaded = executor(Queue((WORKS, "")), Queue((WORKS, "")))
    assert load_on_all_ranks(loaded, request) and loaded.asked == ["safelora_load"]
    half = executor(Queue((WORKS, "no room"), (WORKS, False)), Queue((WORKS, ""), (WORKS, True)))
    with pytest.raises(SafeLoRAError, match=r"^no room$"):
        load_on_all_ranks(half, request)
    assert half.asked == ["safelora_load", "remove_lora"]
    assert not any(rank.answers for rank in half.response_mqs), "every answer was read"


@pytest.mark.parametrize(("index", "quiet"), [(0, True), (1, False), (None, False)])
def test_an_adapter_that_is_still_being_read_is_no_error(index: int | None, quiet: bool) -> None:
    """Of several engines, the API server sees the first one's answer, and the errors of all."""
    request, (reading,) = LoRARequest("tenant", 7, "safelora://a"), rank_says(False)
    ranks = executor(Queue((WORKS, reading), (WORKS, False)), Queue((WORKS, ""), (WORKS, True)))
    ranks.parallel_config = SimpleNamespace(**({} if index is None else {"data_parallel_index": index}))
    if quiet:
        assert load_on_all_ranks(ranks, request) is False
    else:
        with pytest.raises(SafeLoRAError, match="has not been read yet"):
            load_on_all_ranks(ranks, request)
    assert ranks.asked == ["safelora_load", "remove_lora"], "no rank keeps it alone"
    failed = executor(Queue((WORKS, reading), (WORKS, True)), Queue((WORKS, "no room"), (WORKS, True)))
    failed.parallel_config = SimpleNamespace(data_parallel_index=0)
    with pytest.raises(SafeLoRAError, match="no room"):
        load_on_all_ranks(failed, request)


def test_a_rank_answers_with_words() -> None:
    answers = rank_says(True, False, RuntimeError("no room"), RuntimeError())
    assert answers == ["", "it has not been read yet; load it again", "no room", "RuntimeError"]


def rank_says(*results: object) -> list[str]:
    """What a rank answers, by what vLLM's worker gives or raises."""
    worker = MagicMock()
    worker.add_lora.side_effect = list(results)
    return [load_on_rank(worker, LoRARequest("tenant", 7, "safelora://a")) for _ in results]


def test_vllm_still_leaves_answers_unread() -> None:
    """Fails when vLLM reads the answers of all ranks: then the fix can go."""
    ranks = executor(
        Queue((FAILS, "no room"), (WORKS, "answer 0")), Queue((WORKS, True), (WORKS, "answer 1"))
    )
    with pytest.raises(RuntimeError, match="no room"):
        original(MultiprocExecutor, "add_lora")(ranks, LoRARequest("tenant", 7, "safelora://a"))
    assert ranks.collective_rpc("question") == ["answer 0", True]


@pytest.mark.parametrize("value", ["0", "1"])
def test_what_the_switch_leaves_as_it_is(value: str) -> None:
    env = {**os.environ, SWITCH: value, "VLLM_PLUGINS": "safelora"}
    run = subprocess.run(
        [sys.executable, "-c", WHAT_IS_REPLACED], capture_output=True, text=True, env=env, timeout=300
    )
    assert run.returncode == 0, run.stderr
    said = run.stdout + run.stderr  # where logs go depends on vLLM's version
    replaced = set(said.rpartition("replaced:")[2].partition("\n")[0].split())
    assert {"bgmv_shrink", "needs_kv_cache_zeroing", "safetensors", "add_lora"} <= replaced
    switchable = {"__eq__", "__init__", "add_lora_logits"}
    assert replaced & switchable == (set() if value == "0" else switchable)
    left = ", ".join(fix.name for fix in FIXES if not fix.safety)
    assert said.count(f"{SWITCH}=0: these bugs of vLLM are not mended: {left}") == (value == "0")
