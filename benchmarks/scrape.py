"""What a scrape of /metrics costs with 10, 100 and 1,000 adapters, without vLLM's own metrics.

    python benchmarks/scrape.py

Each adapter was used and is loaded; its report has 224 modules. Two API servers share the counters. The first
scrape of a process makes the text of each report, later ones keep it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from recording import RESULTS, write

from safelora_vllm.integration.attestation import PoolState
from safelora_vllm.integration.server.adapter_series import ReportSeries
from safelora_vllm.integration.server.metrics import Known, expose
from safelora_vllm.integration.server.registry import Entry, Served
from safelora_vllm.integration.server.traffic import TrafficTable
from safelora_vllm.policy import Policy
from safelora_vllm.report import ModuleReport, Report
from safelora_vllm.store import Version

MODULES, REPEATS = 224, 20


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    expose(Known())  # imports vLLM, which a server has done
    rows = [measured(count) for count in (10, 100, 1000)]
    for row in rows:
        print(row)
    figures = {"modules": MODULES, "repeats": REPEATS, "rows": rows}
    write("scrape", "python benchmarks/scrape.py", 1, figures, options.out)


def measured(count: int) -> dict[str, Any]:
    """Milliseconds of processor time: the wall clock would depend on what else the machine does."""
    with tempfile.TemporaryDirectory() as folder:
        tables = [TrafficTable(Path(folder)) for _ in range(2)]
        entries = [_entry(number) for number in range(count)]
        for table in tables:
            for entry in entries:
                table.serve(entry.name)
                table.timed(entry.name, 0.2, 0.02)
                table.ended(entry.name, "stop", tokens=100)
        pools = [PoolState(slots=8, capacity=count, device=list(range(8)), host=list(range(count)))]
        reports = ReportSeries()
        times = []
        for _ in range(REPEATS + 1):
            start = time.process_time()
            text = expose(Known(entries=entries, traffic=tables[0].snapshot(), pools=pools), reports)
            times.append(1000 * (time.process_time() - start))
        for table in tables:
            table.close()
    return {
        "adapters": count,
        "first_ms": times[0],
        "median_ms": statistics.median(times[1:]),
        "max_ms": max(times[1:]),
        "samples": sum(not line.startswith("#") for line in text.splitlines()),
        "bytes": len(text),
    }


def _entry(number: int) -> Entry:
    name = f"tenant-{number % 50}/adapter-{number}"
    modules = [
        ModuleReport(f"layers.{layer}.q_proj", 16, 0.3, 0.1, 0.9, 0.01, "projected")
        for layer in range(MODULES)
    ]
    report = Report(name, "d" * 64, "c" * 64, Policy(), True, [], modules, 0.003)
    version = Version(1, "d" * 64, 1, 16, 0.0, "ops", load_seconds=0.5)
    request: Any = SimpleNamespace(lora_int_id=number)
    return Entry(name, number, version, served=Served(request, report))


if __name__ == "__main__":
    main()
