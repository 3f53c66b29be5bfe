"""docs/metrics.md names the metrics that exist, with their types and labels, and asks only for these.

python -m tests.test_metric_docs     writes its tables anew
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from safelora_vllm.errors import refuse
from safelora_vllm.exam.score import Score
from safelora_vllm.gate.admit import Admission, Stages
from safelora_vllm.gate.metrics import GateMetrics
from safelora_vllm.integration.attestation import PoolState
from safelora_vllm.integration.server.adapter_series import MAX_ADAPTER_SERIES
from safelora_vllm.integration.server.exam.counts import VERDICTS, Counted
from safelora_vllm.integration.server.exam.no_exam import NoExam
from safelora_vllm.integration.server.metrics import Kept, Known, expose
from safelora_vllm.integration.server.traffic import OUTCOMES, TrafficTable
from safelora_vllm.methods import METHODS
from safelora_vllm.metric_table import METRICS
from safelora_vllm.policy import MODES, Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.placement import Demand, place
from safelora_vllm.report import Report
from safelora_vllm.store.sizes import PARTS
from safelora_vllm.store.verdicts import Examined
from tests.test_metrics import served
from tests.test_report import REPORT

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "metrics.md").read_text()
FAILURES = ("copy_withdrawn", "gate_restart", "step_load")
WORKERS = {"guarded": 2, "unguarded": 0}
# Of these labels the page names all values. Those of the others are names, digests and codes.
CLOSED = (
    "decision",
    "stat",
    "method",
    "mode",
    "state",
    "result",
    "stage",
    "outcome",
    "tier",
    "level",
    "when",
    "part",
    "kind",
)
BLOCK = re.compile(
    r"(<!-- (\w+): written by python -m tests\.test_metric_docs -->\n)(.*?)(<!-- end -->)", re.S
)
_SUFFIXES = ("_bucket", "_sum", "_count", "_created", "_total")


def stages() -> set[str]:
    """The stages that the gate measures."""
    return set(re.findall(r'stages\.time\("(\w+)"\)', (ROOT / "safelora_vllm/gate/admit.py").read_text()))


class Examining(NoExam):
    """One that has found something."""

    mode = "enforce"

    def found(self, key: str) -> Examined:
        return Examined(Score(0.01, 0.02, 0.03, 8), 1.0, {key: "1"})

    def counted(self) -> Counted:
        return Counted(Counter({(verdict, "safe-lora"): 1 for verdict in VERDICTS}))


@pytest.fixture
def families(cache: ProjectorCache, tmp_path: Path) -> list[Metric]:
    """All of them, with a sample for each value of a label that is one of a closed set."""
    registry = CollectorRegistry()
    gate = GateMetrics(registry)
    gate.describe(cache, place(Demand(0, {}, 0)), enforcing=True)
    gate.record(Admission(REPORT, "k", None, False, Stages(dict.fromkeys(stages(), 0.1))))
    refused = Report.refused("x", "", "c", Policy(), refuse("dora", "…"))
    gate.record(Admission(refused, None, None, False, Stages()))
    gate.record_error("StoreUnavailable")
    entries, pools = served("tenant"), [PoolState(device=[7], host=[7])]
    object.__setattr__(entries[0].served, "request", SimpleNamespace(lora_int_id=7, lora_path="safelora://k"))
    traffic = TrafficTable(tmp_path)
    traffic.serve("tenant")
    for outcome in OUTCOMES:
        traffic.ended("tenant", outcome)
    known = Known(
        entries, WORKERS, 2, {"acme": Kept(1, 5)}, traffic.snapshot(), pools,
        {**dict.fromkeys(PARTS, 1), "free": 1}, 1, 0, dict.fromkeys(FAILURES, 0),
        exam=Examining(), has_key=True, keys_current=True,
    )  # fmt: skip
    return [*registry.collect(), *text_string_to_metric_families(expose(known))]


def named(family: Metric) -> str:
    """As the exposition has it."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def labels(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels} - {"le"}


def _joint(more: str) -> str:
    """Between a meaning and what follows it: another sentence, or words in brackets."""
    return "" if not more else " " if more.startswith("(") else ". "


def metric_rows() -> str:
    """The table of metrics."""
    lines = [
        f"| `{m.name}` | {m.kind} | {', '.join(f'`{label}`' for label in m.labels)} | {m.unit} | "
        f"{_marked(m.meaning)}{_joint(m.more)}{m.more} |"
        for m in METRICS
    ]
    return "\n".join(["| metric | type | labels | unit | meaning |", "|---|---|---|---|---|", *lines])


def query_rows() -> str:
    """The table of questions."""
    lines = [f"| {_marked(question)} | `{query}` |" for m in METRICS for question, query in m.queries]
    return "\n".join(["| question | query |", "|---|---|", *lines])


def _marked(text: str) -> str:
    return re.sub(r"(?<![\w`])(--[a-z-]+|GET /[\w/]+(?:\?[\w=]+)?)", r"`\1`", text)


TABLES: dict[str, Callable[[], str]] = {"metrics": metric_rows, "queries": query_rows}


def written(text: str) -> str:
    """The page with its tables as they have to be."""
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[4]}", text)


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


def test_the_tables_are_those_of_the_code() -> None:
    assert written(PAGE) == PAGE, "run python -m tests.test_metric_docs"


def test_the_table_has_all_metrics_with_their_types_and_labels(families: list[Metric]) -> None:
    found = {named(f): (f.type, labels(f)) for f in families if f.samples and not f.name.endswith("_created")}
    assert {m.name: (m.kind, set(m.labels)) for m in METRICS} == found


def test_the_page_has_all_labels_and_the_values_of_the_closed_ones(families: list[Metric]) -> None:
    written = {codes(label)[0]: set(codes(values)) for label, values in rows("| label | values |")}
    assert set(written) == set().union(*map(labels, families))
    found: dict[str, set[str]] = {label: set() for label in CLOSED}
    for sample in (sample for family in families for sample in family.samples):
        for label, value in sample.labels.items():
            found.get(label, set()).add(value)
    found |= {"mode": set(MODES), "method": {*METHODS, Policy(select="none").applied}}
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
    each = sum(bool({"adapter", "adapter_name"} & sample.labels.keys()) for sample in samples)
    stage = [sample for sample in samples if sample.labels.get("stage") == "read"]
    assert figures == [each, MAX_ADAPTER_SERIES, len(stage)]
    assert sum("le" in sample.labels for sample in stage) == 12


if __name__ == "__main__":
    (ROOT / "docs" / "metrics.md").write_text(written(PAGE))
