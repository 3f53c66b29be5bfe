"""The series of each adapter: what its report says, what became of its requests, where it is loaded.

They end when the adapter is removed. At most `MAX_ADAPTER_SERIES` adapters have series, in the order in which
the process met them; ``safelora_adapters`` counts all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from safelora_vllm.integration.attestation import LOAD_BUCKETS, PoolState
from safelora_vllm.integration.server.exposition import family, head, histogram_lines, labelled, line
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.traffic import BASE, MAX_ROWS, OTHERS, Timings, Traffic
from safelora_vllm.report import Report
from safelora_vllm.store.name_record import tenant_of

MAX_ADAPTER_SERIES = MAX_ROWS
_REPORTED = (
    "safelora_adapter_modules", "safelora_adapter_uncertain_modules", "safelora_adapter_similarity",
    "safelora_adapter_retained_norm", "safelora_adapter_relative_norm", "safelora_adapter_total_norm",
    "safelora_adapter_load_seconds", "safelora_adapter_info",
)  # fmt: skip
_FIRST, _EACH = (
    "safelora_adapter_time_to_first_token_seconds",
    "safelora_adapter_time_per_output_token_seconds",
)


class ReportSeries:
    """The series that follow from reports; their text is made once for each version."""

    def __init__(self, has_opinion: Callable[[Entry], bool] = lambda _: False) -> None:
        """has_opinion: whether requests for what is served have a second opinion."""
        self._has_opinion = has_opinion
        self._made: dict[str, tuple[Entry, tuple[str, ...]]] = {}

    def expose(self, entries: Sequence[Entry]) -> Iterator[str]:
        """Of adapters that are served."""
        known, now = self._made, {}
        for entry in entries[:MAX_ADAPTER_SERIES]:
            made = known.get(entry.name)
            now[entry.name] = made if made and made[0] is entry else self._new(entry)
        self._made = now  # in one step: two scrapes may run at once
        for position, name in enumerate(_REPORTED):
            yield head(name)
            yield from [texts[position] for _, texts in now.values()]

    def _new(self, entry: Entry) -> tuple[Entry, tuple[str, ...]]:
        return entry, _reported(entry, self._has_opinion(entry))


def _reported(entry: Entry, opinion: bool) -> tuple[str, ...]:
    """The samples of each family of `_REPORTED`."""
    assert entry.served is not None
    report = entry.served.report
    name, policy, version = report.adapter, report.policy, entry.version.version if entry.version else 0
    has_it = "true" if opinion else "false"
    info = (name, report.digest, policy.applied, policy.mode, has_it, tenant_of(name), version)
    samples: tuple[list[tuple[tuple[object, ...], float]], ...] = (
        [((name, decision), float(report.count(decision))) for decision in ("projected", "kept")],
        [((name,), float(report.uncertain))],
        _statistics(report, "similarity"),
        _statistics(report, "retained"),
        [((name,), max(report.values("relative_norm"), default=0.0))],
        [((name,), report.total_norm)],
        [((name,), entry.load_seconds)],
        [(info, 1.0)],
    )
    return tuple(
        "".join(line(metric, values, value) for values, value in found)
        for metric, found in zip(_REPORTED, samples, strict=True)
    )


def _statistics(report: Report, field: str) -> list[tuple[tuple[object, ...], float]]:
    if not (column := report.values(field)):
        return []
    return [((report.adapter, "min"), min(column)), ((report.adapter, "mean"), sum(column) / len(column))]


def traffic_series(traffic: Mapping[str, Traffic]) -> Iterator[str]:
    """Of all rows: adapters, the model itself, and the others together."""
    rows = [(labelled(("adapter",), (name,)), found) for name, found in traffic.items()]

    def one(name: str, values: list[float]) -> str:
        texts = [f"{name}{{{labels}}} {value}\n" for (labels, _), value in zip(rows, values, strict=True)]
        return head(name) + "".join(texts)

    yield head("safelora_adapter_requests_total")
    for labels, found in rows:
        for outcome, count in found.requests.items():
            yield f'safelora_adapter_requests_total{{{labels},outcome="{outcome}"}} {count}\n'
    yield one("safelora_adapter_prompt_tokens_total", [t.prompt_tokens for _, t in rows])
    yield one("safelora_adapter_generation_tokens_total", [t.generation_tokens for _, t in rows])
    yield head(_FIRST)
    yield from [histogram_lines(_FIRST, labels, found.first_token) for labels, found in rows]
    yield head(_EACH)
    yield from [histogram_lines(_EACH, labels, found.each_token) for labels, found in rows]
    yield one("safelora_adapter_running_requests", [t.running for _, t in rows])
    yield one("safelora_adapter_waiting_requests", [t.waiting for _, t in rows])
    yield one("safelora_adapter_second_opinion_refusals_total", [t.opinion_refused for _, t in rows])
    yield one("safelora_adapter_last_use_timestamp_seconds", [t.last_use for _, t in rows])


def shown_traffic(traffic: Mapping[str, Traffic], entries: Sequence[Entry]) -> dict[str, Traffic]:
    """The rows with series: of adapters that there are and somebody used, the model, and the rest."""
    there = {entry.name for entry in entries} | {BASE, OTHERS}
    return {name: found for name, found in traffic.items() if name in there and found.last_use}


def pool_series(pools: Sequence[PoolState], entries: Sequence[Entry]) -> Iterator[str]:
    """What the engines have loaded. The ranks of an engine hold the same; the one that did most is shown."""
    engines = {
        number: [p for p in pools if p.engine == number] for number in sorted({p.engine for p in pools})
    }
    names = {
        entry.served.request.lora_int_id: (entry.name, entry.version.rank if entry.version else 0)
        for entry in entries[:MAX_ADAPTER_SERIES]
        if entry.served and entry.served.request
    }
    loaded = [
        ((names[number][0], engine, level, "false", names[number][1]), 1)
        for engine, ranks in engines.items()
        for level, ids in (("gpu", ranks[0].device), ("cpu", ranks[0].host))
        for number in ids
        if number in names and all(number in (r.device if level == "gpu" else r.host) for r in ranks)
    ]
    yield family("safelora_lora_adapter_loaded", loaded)
    for name, field in (
        ("safelora_num_gpu_loaded_lora_adapters", lambda p: len(p.device)),
        ("safelora_num_cpu_loaded_lora_adapters", lambda p: len(p.host)),
        ("safelora_max_gpu_lora_adapters", lambda p: p.slots),
        ("safelora_max_cpu_lora_adapters", lambda p: p.capacity),
    ):
        yield family(name, [((engine,), max(map(field, ranks))) for engine, ranks in engines.items()])
    name = "safelora_lora_adapter_load_seconds"
    yield head(name)
    for engine, ranks in engines.items():
        slowest = max(ranks, key=lambda pool: pool.load_seconds)
        counts = tuple(map(float, slowest.load_counts)) or (0.0,) * (len(LOAD_BUCKETS) + 1)
        timings = Timings(LOAD_BUCKETS, counts, slowest.load_seconds)
        yield histogram_lines(name, labelled(("engine",), (engine,)), timings)
    yield family(
        "safelora_lora_loads_total",
        [
            ((engine, when), max(getattr(pool, field) for pool in ranks))
            for engine, ranks in engines.items()
            for when, field in (("request", "loads"), ("step", "step_loads"))
        ],
    )
    yield family(
        "safelora_lora_evictions_total",
        [
            ((engine, level), max(getattr(pool, field) for pool in ranks))
            for engine, ranks in engines.items()
            for level, field in (("gpu", "device_evictions"), ("cpu", "host_evictions"))
        ],
    )
