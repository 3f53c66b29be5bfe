"""Spans of changes: upload, gate and its stages, load, swap. There with vLLM's ``--otlp-traces-endpoint``.

vLLM makes the provider of each process and sends what it collects. Without the option it makes none, and
spans cost nothing. OpenTelemetry comes with vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

try:
    from opentelemetry import trace
except ImportError:  # vLLM then refuses --otlp-traces-endpoint
    trace = None  # type: ignore[assignment]

from safelora_vllm.integration.json_logs import about

_NAME = "safelora"
Attribute = str | int | float | bool


@contextmanager
def span(name: str, **attributes: Attribute) -> Iterator[Any]:
    """A span of what is done until the block ends, below the one around it; an error is its status.

    Args:
        name: behind ``safelora.``.
        attributes: of ours; ``safelora.request_id`` and ``safelora.tenant`` are added.
    """
    if trace is None:
        yield None
        return
    given = {f"{_NAME}.{key}": value for key, value in {**attributes, **about()}.items()}
    with trace.get_tracer(_NAME).start_as_current_span(f"{_NAME}.{name}", attributes=given) as made:
        yield made


def past_spans(seconds: Mapping[str, float], prefix: str) -> None:
    """Spans that have ended, one behind the other, the last one now.

    Args:
        seconds: of each, in their order.
        prefix: of their names.
    """
    if trace is None or not trace.get_current_span().is_recording():
        return
    start = time.time_ns() - int(1e9 * sum(seconds.values()))
    for name, took in seconds.items():
        end = start + int(1e9 * took)
        made = trace.get_tracer(_NAME).start_span(f"{_NAME}.{prefix}.{name}", start_time=start)
        made.end(end)
        start = end
