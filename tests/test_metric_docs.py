"""docs/metrics.md names the metrics that exist, with their types and labels, and asks only for these."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from safelora_vllm.errors import refuse
from safelora_vllm.gate.admit import Admission, Stages
from safelora_vllm.gate.metrics import GateMetrics
from safelora_vllm.integration.server.metrics import MAX_ADAPTER_SERIES, AdapterCollector, Kept
from safelora_vllm.methods import METHODS
from safelora_vllm.policy import MODES, Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.placement import Demand, place
from safelora_vllm.report import Report
from tests.test_metrics import served
from tests.test_report import REPORT

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "metrics.md").read_text()
WORKERS = {"guarded": 2, "unguarded": 0}
# Of these labels the page names all values. Those of the others are names, digests and codes.
CLOSED = ("decision", "stat", "method", "mode", "state", "result", "stage", "outcome", "tier")
_SUFFIXES = ("_bucket", "_sum", "_count", "_created", "_total")


def stages() -> set[str]:
    """The stages that the gate measures."""
    return set(re.findall(r'stages\.time\("(\w+)"\)', (ROOT / "safelora_vllm/gate/admit.py").read_text()))


@pytest.fixture
def families(cache: ProjectorCache) -> list[Metric]:
    """All of them, with a sample for each value of a label that is one of a closed set."""
    registry = CollectorRegistry()
    gate = GateMetrics(registry)
    gate.describe(cache, place(Demand(0, {}, 0)), enforcing=True)
    gate.record(Admission(REPORT, "k", None, False, Stages(dict.fromkeys(stages(), 0.1))))
    refused = Report.refused("x", "", "c", Policy(), refuse("dora", "…"))
    gate.record(Admission(refused, None, None, False, Stages()))
    gate.record_error("StoreUnavailable")
    entries = served("tenant")
    tenants = {"acme": Kept(1, 5)}
    collector = AdapterCollector(lambda: entries, lambda: WORKERS, lambda: tenants)
    return [*registry.collect(), *collector.collect()]


def named(family: Metric) -> str:
    """As the exposition has it."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def labels(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels} - {"le"}


def rows(head: str) -> list[list[str]]:
    """The cells of the table that begins with a line."""
    table = PAGE[PAGE.index(f"{head}\n") :].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in table.splitlines()[2:]]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def queries() -> list[str]:
    """Those of the table and those of the alerts."""
    found = [row.split("`")[1] for row in PAGE.splitlines() if re.match(r"\| .*\? \| `", row)]
    return [*found, *re.findall(r"expr: (.*)", PAGE)]


def test_the_page_has_all_metrics_with_their_types_and_labels(families: list[Metric]) -> None:
    found = {named(family): (family.type, labels(family)) for family in families}
    written = {
        codes(name)[0]: (kind, set(codes(given)))
        for name, kind, given, *_ in rows("| metric | type | labels | unit | meaning |")
    }
    assert written == found


def test_the_page_has_all_labels_and_the_values_of_the_closed_ones(families: list[Metric]) -> None:
    written = {codes(label)[0]: set(codes(values)) for label, values in rows("| label | values |")}
    assert set(written) == set().union(*map(labels, families))
    found: dict[str, set[str]] = {label: set() for label in CLOSED}
    for sample in (sample for family in families for sample in family.samples):
        for label, value in sample.labels.items():
            found.get(label, set()).add(value)
    found |= {"mode": set(MODES), "method": set(METHODS)}
    assert {label: written[label] for label in CLOSED} == found


def test_queries_ask_for_metrics_and_labels_that_exist(families: list[Metric]) -> None:
    known = {sample.name: labels(family) for family in families for sample in family.samples}
    asked = set()
    for query in queries():
        for name, matchers in re.findall(r"(safelora_\w+)(?:\{([^}]*)\})?", query):
            assert name in known, query
            assert set(re.findall(r"(\w+)!?=", matchers)) <= known[name], query
            asked.add(name)
    base = {next((n.removesuffix(s) for s in _SUFFIXES if n.endswith(s)), n) for n in asked}
    assert {family.name for family in families} <= base, "each metric has its question"


def test_no_other_metric_is_named(families: list[Metric]) -> None:
    names = {sample.name for family in families for sample in family.samples} | set(map(named, families))
    for document in (ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "SECURITY.md"):
        found = set(re.findall(r"\bsafelora_[a-z_]*[a-z]", document.read_text()))
        assert found - names <= {"safelora_vllm", "safelora_attest", "safelora_prepare"}, document


def test_the_figures_of_the_cardinality(families: list[Metric]) -> None:
    figures = [int(cells[1].split(",")[0]) for cells in rows("| what | series |")]
    samples = [sample for family in families for sample in family.samples]
    each = sum("adapter" in sample.labels for sample in samples)
    stage = [sample for sample in samples if sample.labels.get("stage") == "read"]
    assert figures == [each, MAX_ADAPTER_SERIES, len(stage)]
    assert sum("le" in sample.labels for sample in stage) == 12
