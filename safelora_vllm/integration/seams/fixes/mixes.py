"""vLLM's gauge of the adapters that run together has one series.

Not with several API servers, whose series are in shared files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from safelora_vllm.integration.seams.fixes.fix import VLLM, Fix, replace
from safelora_vllm.integration.seams.table import Requirement

_LOGGERS = "vllm.v1.metrics.loggers"


class LatestLabelsGauge:
    """A gauge that keeps the series of its latest labels."""

    def __init__(self, gauge: Any) -> None:
        self._gauge = gauge
        self._latest: dict[str, Any] = {}

    def labels(self, **labels: Any) -> Any:
        """The series of these labels; others are removed."""
        if labels != self._latest:
            self._gauge.clear()
            self._latest = labels
        return self._gauge.labels(**labels)


def with_latest_labels(init: Callable[..., None]) -> Callable[..., None]:
    """vLLM's ``PrometheusStatLogger.__init__``, with that gauge of its own."""

    def start(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.gauge_lora_info is not None and "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            self.gauge_lora_info = LatestLabelsGauge(self.gauge_lora_info)

    return start


def _apply() -> None:
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    replace(PrometheusStatLogger, "__init__", with_latest_labels(PrometheusStatLogger.__init__))


MIXES = Fix(
    name="mixes",
    why=(
        "`vllm:lora_requests_info` gets a series for every mix of adapters that ever ran in one step, and "
        "loses none: with many tenants, memory and `/metrics` grow without end. The newest is kept. With "
        "several API servers, whose metrics are in shared files, it is not mended."
    ),
    upstream=f"none found; introduced by {VLLM}/pull/9477",
    until="vLLM removes old series",
    apply=_apply,
    requirements=(
        Requirement(_LOGGERS, "PrometheusStatLogger.__init__", assigns=("gauge_lora_info",)),
        Requirement(_LOGGERS, "PrometheusStatLogger.record", references=("gauge_lora_info", "labels")),
    ),
)
