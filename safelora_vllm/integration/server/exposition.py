"""Prometheus' text format, of families from `metric_table`.

A scrape has tens of thousands of lines with many adapters. prometheus_client writes each with several calls;
here the labels of an adapter are text that is made once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from safelora_vllm.integration.server.traffic import Timings
from safelora_vllm.metric_table import BY_NAME

Sample = tuple[Sequence[Any], float]


def labelled(labels: Sequence[str], values: Sequence[Any]) -> str:
    """``label="value",…`` without braces."""
    return ",".join(f'{label}="{_escaped(value)}"' for label, value in zip(labels, values, strict=True))


def head(name: str) -> str:
    """HELP and TYPE of a family."""
    described = BY_NAME[name]
    return f"# HELP {name} {described.meaning}\n# TYPE {name} {described.kind}\n"


def family(name: str, samples: Iterable[Sample]) -> str:
    """A counter or gauge. samples: label values in the table's order, and the value."""
    return head(name) + "".join(line(name, values, value) for values, value in samples)


def line(name: str, values: Sequence[Any], value: float) -> str:
    """One sample of a counter or gauge."""
    labels = BY_NAME[name].labels
    return f"{name}{{{labelled(labels, values)}}} {value}\n" if labels else f"{name} {value}\n"


def histogram_lines(name: str, labels: str, timings: Timings) -> str:
    """The samples of a histogram. labels: as `labelled` gives them, or none."""
    totals = list(accumulate(map(int, timings.counts)))
    before = f'{name}_bucket{{{labels}{"," * bool(labels)}le="'
    lines = [f'{before}{le}"}} {total}' for le, total in zip(_bounds(timings.bounds), totals, strict=True)]
    braces = f"{{{labels}}}" if labels else ""
    lines.append(f"{name}_sum{braces} {timings.seconds}\n{name}_count{braces} {totals[-1]}\n")
    return "\n".join(lines)


@cache
def _bounds(bounds: tuple[float, ...]) -> tuple[str, ...]:
    return (*map(str, bounds), "+Inf")


def _escaped(value: Any) -> str:
    return str(value).replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
