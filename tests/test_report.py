"""The report's public JSON, its way there and back, and the table on the terminal."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from rich.console import Console

from safelora_vllm.cli.tables import print_report, print_summary
from safelora_vllm.errors import AdapterRefused, Reason, refuse
from safelora_vllm.policy import Policy
from safelora_vllm.report import ModuleReport, Report

MODULES = [
    ModuleReport("a.q_proj", 8, 0.25, 0.7, 0.01, 0.02, "projected"),
    ModuleReport("a.v_proj", 8, None, 0.6, None, 0.0, "kept"),
]
REPORT = Report("tenant", "d" * 64, "c" * 64, Policy(method="safe-lora"), True, [], MODULES, 0.003)


def test_golden_json() -> None:
    assert json.loads(REPORT.to_json()) == {
        "adapter": "tenant",
        "digest": "d" * 64,
        "projectors": "c" * 64,
        "policy": {
            "method": "safe-lora", "select": "threshold", "threshold": 0.35, "number": 10, "energy": 0.2,
            "max_relative_norm": 1.0, "max_total_norm": 1.0, "mode": "enforce",
        },
        "accepted": True,
        "reasons": [],
        "total_norm": 0.003,
        "signed": False,
        "signed_by": "",
        "modules": [
            {
                "name": "a.q_proj", "rank": 8, "similarity": 0.25, "null_similarity": 0.7, "retained": 0.01,
                "relative_norm": 0.02, "decision": "projected", "similarity_error": 0.0,
                "uncertain": False,
            },
            {
                "name": "a.v_proj", "rank": 8, "similarity": None, "null_similarity": 0.6, "retained": None,
                "relative_norm": 0.0, "decision": "kept", "similarity_error": 0.0, "uncertain": False,
            },
        ],
    }  # fmt: skip


def test_there_and_back() -> None:
    refused = Report.refused(
        "x",
        "d",
        "c",
        Policy(method="safe-lora", mode="report-only"),
        AdapterRefused([Reason("a", "b"), Reason("a", "c")]),
    )
    for report in (REPORT, refused):
        assert Report.from_dict(json.loads(report.to_json())) == report
    assert not refused.accepted and refused.to_dict()["reasons"] == [
        {"code": "a", "message": "b"},
        {"code": "a", "message": "c"},
    ]


def test_a_report_that_an_older_release_stored_is_read() -> None:
    """Its reasons were two parallel lists, and report-only mode was called audit."""
    report = dataclasses.replace(
        REPORT, policy=Policy(mode="report-only"), reasons=[Reason("a", "b"), Reason("a", "c")]
    )
    stored = report.to_dict() | {"reasons": ["a", "a"], "details": ["b", "c"]}
    stored["policy"]["mode"] = "audit"
    assert Report.from_dict(stored) == report


def test_a_report_from_before_thin_caches_decided_has_no_uncertain_modules() -> None:
    stored = REPORT.to_dict()
    for module in stored["modules"]:
        del module["uncertain"], module["similarity_error"]
    assert Report.from_dict(stored) == REPORT and REPORT.uncertain == 0


def test_columns_and_counts() -> None:
    assert (REPORT.count("projected"), REPORT.count("kept")) == (1, 1)
    assert REPORT.values("similarity") == [0.25] and REPORT.values("relative_norm") == [0.02, 0.0]
    assert REPORT.named("other").adapter == "other" and REPORT.adapter == "tenant"


def test_nan_never_becomes_json() -> None:
    bad = ModuleReport("a", 1, math.nan, 0.5, 1.0, 1.0, "kept")
    with pytest.raises(ValueError, match="JSON"):
        Report("x", "d", "c", Policy(method="safe-lora"), True, [], [bad]).to_json()


def test_a_refusal_lists_each_code_once_in_order_and_needs_one() -> None:
    error = AdapterRefused([Reason("b", "1"), Reason("a", "2"), Reason("b", "3")])
    assert error.codes == ["b", "a"] and str(error) == "[b] 1; [a] 2; [b] 3"
    assert refuse("a", "2").reasons == [Reason("a", "2")]
    with pytest.raises(ValueError, match="at least one"):
        AdapterRefused([])


def printed(report: Report) -> str:
    """The table's text."""
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        print_report(report, console)
    return capture.get()


def test_the_table_has_a_row_per_module_and_the_verdict() -> None:
    text = printed(REPORT)
    (row,) = (line for line in text.splitlines() if "a.q_proj" in line)
    assert all(cell in row for cell in ("8", "0.2500", "0.7000", "0.0100", "0.0200", "projected"))
    (row,) = (line for line in text.splitlines() if "a.v_proj" in line)
    assert row.count("–") == 2 and "kept" in row
    assert "tenant: accepted, 1 of 2 modules projected" in text
    assert "total norm 0.003 (allowed 1), largest module 0.02 (allowed 1)" in text


def test_uncertain_modules_are_counted_and_marked() -> None:
    modules = [dataclasses.replace(MODULES[0], similarity_error=0.15, uncertain=True), MODULES[1]]
    report = dataclasses.replace(REPORT, modules=modules)
    assert report.uncertain == 1 and Report.from_dict(json.loads(report.to_json())) == report
    text = printed(report)
    (row,) = (line for line in text.splitlines() if "a.q_proj" in line)
    assert "0.2500 ± 0.1500" in row and "projected (uncertain)" in row
    assert "  the selection of 1 modules is uncertain: the projector cache is thin" in text
    assert "uncertain" not in printed(REPORT)


def test_an_adapter_of_zeros_is_said_to_change_nothing() -> None:
    zeros = dataclasses.replace(REPORT, modules=[MODULES[1], MODULES[1]], total_norm=0.0)
    assert zeros.changes_nothing and not REPORT.changes_nothing
    assert not dataclasses.replace(REPORT, modules=[]).changes_nothing
    sentence = "the adapter changes nothing: each of its modules has an A or a B of zeros"
    assert sentence in printed(zeros) and sentence not in printed(REPORT)
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        print_summary([zeros, REPORT], console)
    first, second = (line for line in capture.get().splitlines() if "tenant" in line)
    assert "accepted, changes nothing" in first and "changes nothing" not in second


def test_reasons_name_options_where_options_were_typed() -> None:
    reason = Reason("relative_norm", "allowed are 1 (`max_relative_norm`), see `lora_alpha`")
    text = printed(dataclasses.replace(REPORT, accepted=False, reasons=[reason]))
    assert "[relative_norm] allowed are 1 (--max-relative-norm), see `lora_alpha`" in text


def test_in_report_only_mode_nothing_is_said_to_be_projected() -> None:
    audited = dataclasses.replace(REPORT, policy=Policy(mode="report-only"))
    assert "tenant: accepted unprojected, as in report-only mode; enforcing would project 1 of 2" in printed(
        audited
    )
    audited = dataclasses.replace(audited, reasons=[Reason("total_norm", "too large")])
    assert "enforcing would refuse it" in printed(audited)


def test_markup_in_a_tenants_strings_is_shown_not_interpreted() -> None:
    report = Report.refused(
        "[bold]x[/bold]", "", "c", Policy(method="safe-lora"), refuse("code", "[red]detail[/red]")
    )
    text = printed(report)
    assert "[bold]x[/bold]: refused" in text and "[code] [red]detail[/red]" in text
