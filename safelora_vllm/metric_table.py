"""Every metric of a guarded server, as data: the exposition and docs/metrics.md are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Described:
    """A metric.

    Attributes:
        name: as the exposition has it.
        kind: its type.
        labels: without ``le``.
        unit: of its value.
        meaning: its HELP text.
        more: what the page adds to it.
        queries: questions with the PromQL that answers them.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    unit: str
    meaning: str
    more: str = ""
    queries: tuple[tuple[str, str], ...] = ()


METRICS = (
    Described(
        "safelora_adapters", "gauge", (), "adapters",
        "adapters served now, --lora-modules included",
        queries=(
            (
                "How many adapters are served?",
                "max(safelora_adapters)",
            ),
            (
                "Do the servers of one store disagree for long?",
                "max(safelora_adapters) - min(safelora_adapters)",
            ),
            (
                "How many adapters fewer are served than within the last day?",
                "max(max_over_time(safelora_adapters[1d])) - max(safelora_adapters)",
            ),
            (
                "Is a gate down while its server answers?",
                "safelora_adapters unless on (instance) safelora_enforcing",
            ),
        ),
    ),
    Described(
        "safelora_adapter_modules", "gauge", ("adapter", "decision"), "modules",
        "modules of the adapter that were projected, or kept as they were",
        queries=(
            (
                "Which adapters have modules that were kept unprojected?",
                "safelora_adapter_modules{decision=\"kept\"} > 0",
            ),
        ),
    ),
    Described(
        "safelora_adapter_uncertain_modules", "gauge", ("adapter",), "modules",
        "modules that are projected only because the interval of their similarity leaves the selection open",
        more="([why](policies.md#thin-and-exact-caches))",
        queries=(
            (
                "Which adapters would lose less with an exact projector cache?",
                "safelora_adapter_uncertain_modules > 0",
            ),
        ),
    ),
    Described(
        "safelora_adapter_similarity", "gauge", ("adapter", "stat"), "ratio",
        "cosine of ĈΔW and ΔW, over the adapter's modules; the middle of an interval, which can be wide, "
        "where Ĉ was not read",
        more="([why](http-api.md#upload))",
        queries=(
            (
                "Which adapters does a similarity threshold select first?",
                "bottomk(10, safelora_adapter_similarity{stat=\"min\"})",
            ),
        ),
    ),
    Described(
        "safelora_adapter_retained_norm", "gauge", ("adapter", "stat"), "ratio",
        "‖ΔW'‖ / ‖ΔW‖, over the adapter's modules; no measure of harm",
        queries=(
            (
                "From which adapters does the projection take most?",
                "bottomk(10, safelora_adapter_retained_norm{stat=\"mean\"})",
            ),
        ),
    ),
    Described(
        "safelora_adapter_relative_norm", "gauge", ("adapter",), "ratio",
        "largest ‖ΔW‖ / ‖W‖ of a module; capped by --max-relative-norm",
        queries=(
            (
                "Which adapters have the largest module?",
                "topk(10, safelora_adapter_relative_norm)",
            ),
        ),
    ),
    Described(
        "safelora_adapter_total_norm", "gauge", ("adapter",), "ratio",
        "√(Σ‖ΔW‖² / Σ‖W‖²), the latter over all modules of the projector cache; capped by --max-total-norm",
        queries=(
            (
                "Which adapters are near the cap of 0.006?",
                "safelora_adapter_total_norm > 0.9 * 0.006",
            ),
            (
                "What total norm do 99 % of the adapters have at most?",
                "quantile(0.99, safelora_adapter_total_norm)",
            ),
        ),
    ),
    Described(
        "safelora_adapter_load_seconds", "gauge", ("adapter",), "seconds",
        "from the request that made the served version until it was served, on each API server and after a "
        "restart too; 0 for --lora-modules",
        queries=(
            (
                "Which uploads took longest?",
                "topk(10, safelora_adapter_load_seconds)",
            ),
        ),
    ),
    Described(
        "safelora_adapter_info", "gauge",
        ("adapter", "digest", "method", "mode", "second_opinion", "tenant", "version"), "1",
        "digest of the uploaded content, and method and mode of the policy that it was judged by; whether "
        "its requests have a second opinion, true or false; the tenant that owns it, and its version: 0 for "
        "--lora-modules",
        queries=(
            (
                "Is anything served unprojected?",
                "safelora_adapter_info{mode=\"report-only\"} or safelora_adapter_info{method=\"none\"}",
            ),
            (
                "Which adapters are served with a second opinion?",
                "safelora_adapter_info{second_opinion=\"true\"}",
            ),
            (
                "Which version of an adapter does each server serve?",
                "max by (adapter, version, instance) (safelora_adapter_info)",
            ),
        ),
    ),
    Described(
        "safelora_adapter_requests_total", "counter", ("adapter", "outcome"), "requests",
        "requests for an adapter that have ended, by how they ended",
        queries=(
            (
                "Which adapters have the most requests?",
                "topk(10, sum by (adapter) (rate(safelora_adapter_requests_total[5m])))",
            ),
        ),
    ),
    Described(
        "safelora_adapter_prompt_tokens_total", "counter", ("adapter",), "tokens",
        "tokens of the prompts of requests for an adapter",
        queries=(
            (
                "Whose prompts take most of the engine?",
                "topk(10, rate(safelora_adapter_prompt_tokens_total[5m]))",
            ),
        ),
    ),
    Described(
        "safelora_adapter_generation_tokens_total", "counter", ("adapter",), "tokens",
        "tokens that were generated for an adapter, by requests that have ended",
        queries=(
            (
                "For which adapters are most tokens generated?",
                "topk(10, rate(safelora_adapter_generation_tokens_total[5m]))",
            ),
        ),
    ),
    Described(
        "safelora_adapter_time_to_first_token_seconds", "histogram", ("adapter",), "seconds",
        "time from the arrival of a request for an adapter to its first token, as vLLM measures it",
        queries=(
            (
                "Which adapters answer late?",
                "topk(10, histogram_quantile(0.95, sum by (adapter, le) "
                "(rate(safelora_adapter_time_to_first_token_seconds_bucket[5m]))))",
            ),
        ),
    ),
    Described(
        "safelora_adapter_time_per_output_token_seconds", "histogram", ("adapter",), "seconds",
        "time for each token after the first, one mean for each request for an adapter",
        queries=(
            (
                "Which adapters generate slowly?",
                "topk(10, histogram_quantile(0.95, sum by (adapter, le) "
                "(rate(safelora_adapter_time_per_output_token_seconds_bucket[5m]))))",
            ),
        ),
    ),
    Described(
        "safelora_adapter_running_requests", "gauge", ("adapter",), "requests",
        "requests for an adapter that are in the engine's batch now",
        queries=(
            (
                "Which adapters are at work?",
                "sum by (adapter) (safelora_adapter_running_requests) > 0",
            ),
        ),
    ),
    Described(
        "safelora_adapter_waiting_requests", "gauge", ("adapter",), "requests",
        "requests for an adapter that wait for the engine now",
        queries=(
            (
                "Whose requests wait?",
                "sum by (adapter) (safelora_adapter_waiting_requests) > 0",
            ),
        ),
    ),
    Described(
        "safelora_adapter_second_opinion_refusals_total", "counter", ("adapter",), "requests",
        "requests for an adapter that the aligned model refused in its place, as a second opinion",
        queries=(
            (
                "Which adapters are asked most for what the aligned model refuses?",
                "topk(10, sum by (adapter) "
                "(increase(safelora_adapter_second_opinion_refusals_total[1d])))",
            ),
        ),
    ),
    Described(
        "safelora_adapter_last_use_timestamp_seconds", "gauge", ("adapter",), "seconds",
        "when a request for an adapter last began or ended on this server, since 1970",
        queries=(
            (
                "Which adapters has nobody used for a week?",
                "time() - max by (adapter) (safelora_adapter_last_use_timestamp_seconds) > 7 * 86400",
            ),
        ),
    ),
    Described(
        "safelora_tenant_adapters", "gauge", ("tenant",), "adapters",
        "names in the store that a tenant owns, served or not",
        queries=(
            (
                "How many names has each tenant?",
                "max by (tenant) (safelora_tenant_adapters)",
            ),
        ),
    ),
    Described(
        "safelora_tenant_bytes", "gauge", ("tenant",), "bytes",
        "its uploads in the store, each content once, as its quota counts them",
        queries=(
            (
                "Which tenants take most of the store?",
                "topk(10, max by (tenant) (safelora_tenant_bytes))",
            ),
        ),
    ),
    Described(
        "safelora_tenant_loads_total", "counter", ("tenant", "result"), "adapters",
        "judgements of the gate by the tenant that owns the name",
        queries=(
            (
                "Whose uploads are refused?",
                "sum by (tenant) (increase(safelora_tenant_loads_total{result=\"refused\"}[1d])) > 0",
            ),
        ),
    ),
    Described(
        "safelora_workers", "gauge", ("state",), "workers",
        "vLLM workers with and without the guard",
        queries=(
            (
                "Has a worker lost its guard?",
                "safelora_workers{state=\"unguarded\"} > 0",
            ),
        ),
    ),
    Described(
        "safelora_lora_adapter_loaded", "gauge", ("adapter_name", "engine", "level", "pinned", "rank"),
        "0 or 1",
        "1 for an adapter that an engine has loaded: on the device or in host memory",
        queries=(
            (
                "Which adapters are on the device?",
                "safelora_lora_adapter_loaded{level=\"gpu\"}",
            ),
        ),
    ),
    Described(
        "safelora_num_gpu_loaded_lora_adapters", "gauge", ("engine",), "adapters",
        "adapters in the device's slots",
        queries=(
            (
                "Which share of the slots is taken?",
                "safelora_num_gpu_loaded_lora_adapters / safelora_max_gpu_lora_adapters",
            ),
        ),
    ),
    Described(
        "safelora_num_cpu_loaded_lora_adapters", "gauge", ("engine",), "adapters",
        "adapters in host memory, those on the device included",
        queries=(
            (
                "Which share of the host memory for adapters is taken?",
                "safelora_num_cpu_loaded_lora_adapters / safelora_max_cpu_lora_adapters",
            ),
        ),
    ),
    Described(
        "safelora_max_gpu_lora_adapters", "gauge", ("engine",), "adapters",
        "slots on the device, --max-loras",
    ),
    Described(
        "safelora_max_cpu_lora_adapters", "gauge", ("engine",), "adapters",
        "adapters that fit in host memory, --max-cpu-loras",
    ),
    Described(
        "safelora_lora_adapter_load_seconds", "histogram", ("engine",), "seconds",
        "time that loading an adapter took of an engine's step loop",
        queries=(
            (
                "How long do loads hold up all streams?",
                "histogram_quantile(0.95, sum by (engine, le) "
                "(rate(safelora_lora_adapter_load_seconds_bucket[15m])))",
            ),
        ),
    ),
    Described(
        "safelora_lora_loads_total", "counter", ("engine", "when"), "adapters",
        "adapters that an engine loaded: at a request to load, or again in the step loop, where all "
        "streams wait",
        queries=(
            (
                "Are adapters read again in the step loop?",
                "sum by (instance, engine) (rate(safelora_lora_loads_total{when=\"step\"}[15m])) > 0",
            ),
        ),
    ),
    Described(
        "safelora_lora_evictions_total", "counter", ("engine", "level"), "adapters",
        "adapters that made room for others, on the device or in host memory",
        queries=(
            (
                "How often do adapters push each other out of the slots?",
                "sum by (instance, engine) (rate(safelora_lora_evictions_total{level=\"gpu\"}[15m]))",
            ),
        ),
    ),
    Described(
        "safelora_workers_expected", "gauge", (), "workers",
        "workers that the server has",
        queries=(
            (
                "Is a worker missing?",
                "safelora_workers_expected - ignoring(state) safelora_workers{state=\"guarded\"} > 0",
            ),
        ),
    ),
    Described(
        "safelora_ready", "gauge", (), "0 or 1",
        "1 where GET /safelora/ready?strict=true answers 200",
        queries=(
            (
                "On which servers are workers, gate, store or keys file out of order?",
                "safelora_ready == 0",
            ),
        ),
    ),
    Described(
        "safelora_keys_current", "gauge", (), "0 or 1",
        "1 while the keys in force are those of the keys file; 0 while the file is gone or wrong",
        more="Absent without --keys. At 0, keys that were removed from the file still work.",
        queries=(
            (
                "Where did an edit of the keys file go wrong?",
                "safelora_keys_current == 0",
            ),
        ),
    ),
    Described(
        "safelora_store_bytes", "gauge", ("part",), "bytes",
        "size of a part of the adapter store, at most a minute old",
        queries=(
            (
                "What takes the store's space?",
                "max by (part) (safelora_store_bytes)",
            ),
        ),
    ),
    Described(
        "safelora_store_limit_bytes", "gauge", (), "bytes",
        "--store-bytes, the budget of published copies; absent without one",
        queries=(
            (
                "How full is the budget of published copies?",
                "safelora_store_bytes{part=\"published\"} / ignoring(part) safelora_store_limit_bytes",
            ),
        ),
    ),
    Described(
        "safelora_store_free_bytes", "gauge", (), "bytes",
        "free space of the store's disk",
        queries=(
            (
                "Is the store's disk nearly full?",
                "safelora_store_free_bytes < 1e9",
            ),
        ),
    ),
    Described(
        "safelora_uploads_in_flight", "gauge", (), "uploads",
        "uploads and rollbacks that the API server that was scraped is busy with",
        queries=(
            (
                "Do uploads queue up?",
                "sum(safelora_uploads_in_flight)",
            ),
        ),
    ),
    Described(
        "safelora_failures_survived_total", "counter", ("kind",), "failures",
        "failures that the server went on after",
        queries=(
            (
                "What did the server survive?",
                "sum by (instance, kind) (increase(safelora_failures_survived_total[1d])) > 0",
            ),
        ),
    ),
    Described(
        "safelora_build_info", "gauge", ("version", "vllm"), "1",
        "versions of safelora-vllm and of vLLM",
        queries=(
            (
                "Which versions run?",
                "count by (version, vllm) (safelora_build_info)",
            ),
        ),
    ),
    Described(
        "safelora_loads_total", "counter", ("result", "reason"), "adapters",
        "judgements of the gate",
        queries=(
            (
                "Why are adapters refused?",
                "sum by (reason) (increase(safelora_loads_total{result=\"refused\"}[1d])) > 0",
            ),
            (
                "What did the gate refuse since it started? Stored names that a stricter policy refuses "
                "are in it, and refused uploads",
                "sum by (instance, reason) (safelora_loads_total{result=\"refused\"}) > 0",
            ),
            (
                "What share of the judged adapters is refused?",
                "sum(rate(safelora_loads_total{result=\"refused\"}[1h])) / "
                "sum(rate(safelora_loads_total[1h]))",
            ),
            (
                "Does the gate fail for reasons of its own?",
                "sum by (reason) (increase(safelora_loads_total{result=\"error\"}[15m])) > 0",
            ),
        ),
    ),
    Described(
        "safelora_stage_seconds", "histogram", ("stage",), "seconds",
        "time that one adapter spent in a stage of the gate",
        queries=(
            (
                "Which stage of the gate is slow?",
                "histogram_quantile(0.95, sum by (le, stage) (rate(safelora_stage_seconds_bucket[15m])))",
            ),
            (
                "How much of its time is the gate at work?",
                "sum by (instance) (rate(safelora_stage_seconds_sum[15m]))",
            ),
        ),
    ),
    Described(
        "safelora_gate_cache_total", "counter", ("outcome",), "adapters",
        "whether the same content was already published by the same rules",
        queries=(
            (
                "How often is content known already?",
                "sum(rate(safelora_gate_cache_total{outcome=\"hit\"}[1h])) / "
                "sum(rate(safelora_gate_cache_total[1h]))",
            ),
        ),
    ),
    Described(
        "safelora_projector_bytes", "gauge", ("tier",), "bytes",
        "tensors of the projector cache that the server's policy reads, by where they are",
        queries=(
            (
                "How much memory do projectors take?",
                "safelora_projector_bytes{tier!=\"disk\"}",
            ),
            (
                "Which share of the projectors is read from disk for each adapter?",
                "safelora_projector_bytes{tier=\"disk\"} / ignoring(tier) sum without(tier) "
                "(safelora_projector_bytes)",
            ),
        ),
    ),
    Described(
        "safelora_gate_memory_budget_bytes", "gauge", (), "bytes",
        "--projector-memory: of the gate's device, for projectors and the work of an adapter",
        queries=(
            (
                "How much of its device may the gate take, without CUDA's context?",
                "safelora_gate_memory_budget_bytes",
            ),
        ),
    ),
    Described(
        "safelora_gate_memory_transient_bytes", "gauge", (), "bytes",
        "of the budget, for the work of an adapter",
        queries=(
            (
                "How much of that is not for projectors?",
                "safelora_gate_memory_transient_bytes",
            ),
        ),
    ),
    Described(
        "safelora_exam_info", "gauge", ("exam",), "1",
        "1 with how adapters are examined: report, enforce, or off where the aligned model is no measure",
        more="The metrics of the exam are absent with --exam off.",
        queries=(
            (
                "Where is an exam off that was asked for?",
                "safelora_exam_info{exam=\"off\"} == 1",
            ),
        ),
    ),
    Described(
        "safelora_exams_total", "counter", ("verdict", "rung"), "exams",
        "copies examined, by rung and verdict (passed, passed_with_opinion, failed, unavailable)",
        more="passed_with_opinion: by its score alone it would have failed. The rung `policy` is one that is "
        "not on the ladder. Without SAFELORA_METRICS_KEY `rung` is empty, and passed_with_opinion is passed. "
        "A verdict that the store has is not "
        "counted again. Re-examinations count.",
        queries=(
            (
                "How many exams ended without a score in the last hour?",
                "sum(increase(safelora_exams_total{verdict=\"unavailable\"}[1h]))",
            ),
            (
                "How many copies have failed an exam by their score in the last day?",
                "sum(increase(safelora_exams_total{verdict=~\"failed|passed_with_opinion\"}[1d]))",
            ),
        ),
    ),
    Described(
        "safelora_exam_seconds", "histogram", (), "seconds",
        "how long an exam of one copy took",
        queries=(
            (
                "How long does an exam take on average?",
                "rate(safelora_exam_seconds_sum[1h]) / rate(safelora_exam_seconds_count[1h])",
            ),
        ),
    ),
    Described(
        "safelora_adapter_exam_score", "gauge", ("adapter",), "nats per token",
        "upper confidence bound of the loyalty drop of what is served, compared with --exam-threshold",
        more="Of the first exam and the newest re-examination, the larger one. "
        "Absent without SAFELORA_METRICS_KEY: it would help authors to train against the exam.",
        queries=(
            (
                "Which adapters are furthest from the aligned model?",
                "topk(10, max by (adapter) (safelora_adapter_exam_score))",
            ),
            (
                "Which served adapters are above the default --exam-threshold?",
                "max by (adapter) (safelora_adapter_exam_score) > 0.02",
            ),
        ),
    ),
    Described(
        "safelora_enforcing", "gauge", (), "0 or 1",
        "1 in the mode `enforce`, with `--select none` too; 0 in report-only mode",
        queries=(
            (
                "Is a server in report-only mode?",
                "safelora_enforcing == 0",
            ),
        ),
    ),
)  # fmt: skip
BY_NAME = {metric.name: metric for metric in METRICS}
