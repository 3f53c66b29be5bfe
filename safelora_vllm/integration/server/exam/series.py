"""The exam's metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from safelora_vllm.integration.server.adapter_series import MAX_ADAPTER_SERIES
from safelora_vllm.integration.server.exam.counts import BUCKETS, PASSED, PASSED_WITH_OPINION
from safelora_vllm.integration.server.exam.no_exam import NoExam
from safelora_vllm.integration.server.exposition import family, head, histogram_lines
from safelora_vllm.integration.server.registry import Entry
from safelora_vllm.integration.server.traffic import Timings
from safelora_vllm.store.verdicts import Examined


def exam_series(exam: NoExam, served: Sequence[Entry], has_key: bool) -> Iterator[str]:
    """Of this server's exam, of all exams of the host, and of the adapters that are served.

    None where nobody asked for an exam. Without a key for the metrics everybody sees them: then there are no
    scores, nor rungs, nor what passed by a second opinion only, by which authors could train against the
    probes.
    """
    if exam.mode == "off" and not exam.cause:
        return
    counted = exam.counted()
    exams: Counter[tuple[str, str]] = Counter()
    for (verdict, rung), count in counted.exams.items():
        if has_key:
            exams[verdict, rung] += count
        else:
            exams[PASSED if verdict == PASSED_WITH_OPINION else verdict, ""] += count
    scores = [
        ((entry.name,), max(found.score.bound for found in both if found))
        for entry in served[:MAX_ADAPTER_SERIES]
        if entry.served and any(both := _found(exam, entry.served.key))
    ]
    yield family("safelora_exam_info", [((exam.mode,), 1)])
    yield family("safelora_exams_total", sorted(exams.items()))
    yield head("safelora_exam_seconds")
    timings = Timings(BUCKETS, tuple(map(float, counted.buckets)), counted.seconds)
    yield histogram_lines("safelora_exam_seconds", "", timings)
    if has_key:
        yield family("safelora_adapter_exam_score", scores)


def _found(exam: NoExam, key: str) -> tuple[Examined | None, Examined | None]:
    """What both halves of the probes found of a copy."""
    return exam.found(key), exam.found_again(key)
