"""The tables and sentences of the commands, cell by cell."""

from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from safelora_vllm.cli import audit, audit_table, calibrate, plan, tables, tables_exam
from safelora_vllm.cli import store as store_command
from safelora_vllm.cli.main import main
from safelora_vllm.errors import Reason
from safelora_vllm.exam.ladder import parse
from safelora_vllm.exam.score import Score
from safelora_vllm.exam.sitting import sit
from safelora_vllm.methods.method import Spread
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.placement import Placement
from safelora_vllm.projectors.plan import Plan
from safelora_vllm.projectors.sizes import CacheBytes, ModuleGroup
from safelora_vllm.report import ModuleReport, Report
from safelora_vllm.store import AdapterRecord, NameStore, Version

GIB, MIB = 1024**3, 1024**2
MODULES = [
    ModuleReport("a.q_proj", 8, 0.25, 0.01, 0.7, 0.02, "projected", 0.0625),
    ModuleReport("a.v_proj", 4, None, 0.03, None, 0.04, "kept"),
]
REPORT = Report("tenant", "d", "c", Policy(), True, [], MODULES, 0.003)
LARGE = Report(
    "other", "d", "c", Policy(), False,
    [Reason("relative_norm", "x"), Reason("total_norm", "y"), Reason("total_norm", "z")],
    [dataclasses.replace(MODULES[0], relative_norm=3.0)], 0.5,
)  # fmt: skip
NONE = Report("third", "", "c", Policy(), False, [Reason("dora", "use_dora")], [])


def cells(text: str) -> list[list[str]]:
    """The rows of a table, the header first."""
    lines = [line for line in text.splitlines() if line.startswith(("│", "┃"))]
    return [[cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")] for line in lines]


def shown(call: Any, *args: Any) -> str:
    console = Console(width=200, no_color=True)
    with console.capture() as capture:
        call(*args, console)
    return capture.get()


def test_a_report() -> None:
    text = shown(tables.print_report, REPORT)
    assert cells(text) == [
        ["module", "rank", "similarity", "c₀", "retained", "relative norm", "decision"],
        ["a.q_proj", "8", "0.2500 ± 0.0625", "0.0100", "0.7000", "0.0200", "projected"],
        ["a.v_proj", "4", "–", "0.0300", "–", "0.0400", "kept"],
    ]
    assert text.splitlines()[0].strip() == f"tenant: {Policy().summary}, enforce"
    assert text.splitlines()[-2:] == [
        "tenant: accepted, 1 of 2 modules projected",
        "  total norm 0.003 (allowed 1), largest module 0.04 (allowed 1)",
    ]


def test_a_refused_report_with_figures_and_one_without() -> None:
    assert shown(tables.print_report, LARGE).splitlines()[-5:] == [
        "other: refused, 1 of 1 modules would have been projected",
        "  total norm 0.5 (allowed 1), largest module 3 (allowed 1)",
        "  [relative_norm] x", "  [total_norm] y", "  [total_norm] z",
    ]  # fmt: skip
    assert shown(tables.print_report, NONE) == "third: refused\n  [dora] use_dora\n"


def test_a_summary() -> None:
    text = shown(tables.print_summary, [REPORT, LARGE, NONE])
    assert cells(text) == [
        ["adapter", "modules", "projected", "total norm", "largest module norm", "verdict"],
        ["tenant", "2", "1", "0.003", "0.04", "accepted"],
        ["other", "1", "1", "0.5", "3", "refused: relative_norm, total_norm"],
        ["third", "–", "–", "–", "–", "refused: dora"],
    ]
    assert text.splitlines()[-1] == "largest: total norm 0.5, of a module 3"
    assert text.splitlines()[0].strip() == "input-removal, enforce"
    assert "largest" not in shown(tables.print_summary, [NONE]).splitlines()[-1]
    uploaded = dataclasses.replace(REPORT, policy=Policy(select="none"))
    assert shown(tables.print_summary, [uploaded]).splitlines()[0].strip() == "nothing projected, enforce"


def test_a_rank_that_a_server_takes_only_when_told() -> None:
    high = dataclasses.replace(REPORT, modules=[dataclasses.replace(MODULES[0], rank=17), MODULES[1]])
    line = "largest rank 17: serve with --max-lora-rank 17 or more"
    assert shown(tables.print_report, high).splitlines()[-1] == f"  {line}"
    assert shown(tables.print_summary, [REPORT, high]).splitlines()[-1] == line
    usual = dataclasses.replace(REPORT, modules=[dataclasses.replace(MODULES[0], rank=16)])
    assert "--max-lora-rank" not in shown(tables.print_report, usual)


@pytest.mark.parametrize(("piped", "columns", "width"), [(True, None, 160), (True, "90", 90)])
def test_the_width_of_the_terminal(
    piped: bool, columns: str | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert sys.stdout.isatty() is not piped
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    assert tables.terminal().width == width


def test_the_names_of_a_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    names = NameStore(tmp_path)
    names.reserve_ids(1)
    old = Version(0, "a" * 64, 1, rank=1, created=0.0, by="admin/x")
    new = Version(
        0, "b" * 64, 12_345_678, rank=8, created=0.0, by="acme/ci", policy={"energy": 0.1}, override=True
    )
    names.update("acme/x", lambda _: AdapterRecord("acme/x").with_version(old).with_version(new))
    names.update("plain", lambda _: AdapterRecord("plain").with_version(old))
    assert main(["store", "ls", "--adapter-store", str(tmp_path)]) == 0
    header, first, second = cells(capsys.readouterr().out)
    assert header == ["name", "state", "version", "digest", "size", "rank", "created", "by", "policy"]
    assert first[:6] + first[7:] == [
        "acme/x", "unknown", "2", "b" * 12, "12.3 MB", "8", "acme/ci", "OVERRIDE energy=0.1",
    ]  # fmt: skip
    assert first[6] == "1970-01-01 00:00Z"
    assert second[:6] + second[7:] == ["plain", "unknown", "1", "a" * 12, "1 B", "1", "admin/x", ""]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (10**6 - 1, "1000.0 KB"), (10**6, "1.0 MB"),
     (2_340_000_000, "2.3 GB"), (10**12, "1.0 TB"), (10**16, "10000.0 TB")],
)  # fmt: skip
def test_sizes_of_a_store(nbytes: int, text: str) -> None:
    assert store_command._in_words(nbytes) == text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0"), (1, "0.0 KiB"), (1024, "1.0 KiB"), (MIB // 10, "102.4 KiB"), (MIB // 10 + 1, "0.1 MiB"),
     (MIB, "1.0 MiB"), (GIB - 1, "1024.0 MiB"), (GIB, "1.0 GiB"), (1536 * MIB, "1.5 GiB")],
)  # fmt: skip
def test_sizes_of_a_plan(nbytes: int, text: str) -> None:
    assert plan._size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (119.9, "119.9 s"), (120, "2.0 min"), (7199, "120.0 min"), (7200, "2.0 h")],
)
def test_durations_of_a_plan(seconds: float, text: str) -> None:
    assert plan._duration(seconds) == text


GROUP = ModuleGroup(
    ("a.q_proj", "a.v_proj", "b.q_proj"), (64, 96), "dense", (9, 7, 8), (3, 3, 3), (0, 2, 1),
    CacheBytes(MIB, MIB, MIB, 0), CacheBytes(),
)  # fmt: skip
PLACED = Placement(
    budget=1 * GIB, device_bytes=240 * MIB, host_bytes=0, disk_bytes=0, transient=256 * MIB, passing=0,
    on_device=frozenset(), on_host=frozenset(),
)  # fmt: skip
PLAN = Plan(
    groups=(GROUP,), assumed=True, max_energy=0.95, disk=CacheBytes(1 * MIB, 2 * MIB, 4 * MIB, 8 * MIB),
    held=CacheBytes(16 * MIB, 32 * MIB, 64 * MIB, 128 * MIB), disk_at_most=3 * GIB, held_at_most=4 * GIB,
    lora_rank=16, adapter_uploaded=8 * MIB, adapter_served=4 * MIB, placement=PLACED, least_bytes=300 * MIB,
    on_gpu=False, gpu_memory=None, weight_bytes=9 * GIB, build_device="cpu", build_seconds=90.0,
)  # fmt: skip


def test_the_rows_of_a_plan() -> None:
    assert plan._cells(GROUP) == ["3", "q_proj, v_proj", "64 × 96", "7–9", "3", "0–2", "3.0 MiB"]
    assert plan._sections(PLAN) == [
        [
            ("projector cache on disk", "15.0 MiB"),
            ("  Ĉ or V", "1.0 MiB"),
            ("  R", "2.0 MiB"),
            ("  L", "4.0 MiB"),
            ("  shares of energy", "8.0 MiB"),
            ("  at most, if V has no dominant directions", "3.0 GiB"),
        ],
        [
            ("gate on a CPU", "496.0 MiB"),
            ("  Ĉ or V", "16.0 MiB"),
            ("  R", "32.0 MiB"),
            ("  L", "64.0 MiB"),
            ("  shares of energy", "128.0 MiB"),
            ("  for the work of an adapter", "256.0 MiB"),
            ("  projectors at most, if V has no dominant directions", "4.0 GiB"),
            ("smallest --projector-memory", f"{300 * MIB}"),
        ],
        [
            ("an adapter of all modules at rank 16, uploaded in float32", "8.0 MiB"),
            ("the same, served in bfloat16", "4.0 MiB"),
        ],
        [("build on cpu here, estimated", "90.0 s")],
    ]


def test_the_rows_of_a_plan_on_a_gpu() -> None:
    placed = dataclasses.replace(PLACED, device_bytes=112 * MIB)
    gpu = dataclasses.replace(PLAN, on_gpu=True, gpu_memory=16 * GIB, assumed=False, placement=placed)
    cache, gate, _, _ = plan._sections(gpu)
    assert cache[-1][0] == "  shares of energy"
    assert gate == [
        ("gate on a GPU", "1.5 GiB"),
        ("  Ĉ or V", "16.0 MiB"),
        ("  R", "32.0 MiB"),
        ("  L", "64.0 MiB"),
        ("  for the work of an adapter", "256.0 MiB"),
        ("  allowance for CUDA's context and libraries, as on an H100", "1.2 GiB"),
        ("smallest --projector-memory", f"{300 * MIB}"),
        ("the gate's share of the GPU's 16.0 GiB", "9.6%"),
    ]


def test_the_rows_of_a_plan_where_the_device_does_not_hold_all() -> None:
    """What is elsewhere is not the device's. Without Ĉ and V no smaller memory could be set."""
    placed = dataclasses.replace(PLACED, host_bytes=9 * MIB, disk_bytes=5 * MIB)
    gate = plan._sections(dataclasses.replace(PLAN, placement=placed, assumed=False))[1]
    assert gate[1] == ("  Ĉ or V", "2.0 MiB")
    assert gate[-3:] == [
        ("Ĉ or V in pinned host memory", "9.0 MiB"),
        ("Ĉ or V that it reads from disk at each use", "5.0 MiB"),
        ("smallest --projector-memory", f"{300 * MIB}"),
    ]
    thin = dataclasses.replace(PLAN, held=dataclasses.replace(PLAN.held, operator=0), assumed=False)
    assert plan._sections(thin)[1][-1] == ("  for the work of an adapter", "256.0 MiB")


SAFE_LORA, SOME = Policy(method="safe-lora"), Policy(select="threshold")
WITHOUT = "take --method input-removal and --select all, which read"
REST = "so that it reads the rest from disk at each use, or take"


@pytest.mark.parametrize(
    ("policy", "operator", "memory", "weights", "told"),
    [
        (Policy(), 0, 11, 9, None),
        (Policy(), 0, 9, 9, "model's 9.0 GiB of weights, whatever its projectors take: take a larger"),
        (Policy(), 0, 10.2, 9, "model's 9.0 GiB of weights: take a smaller --energy."),
        (Policy(), 0, 4, 6, "3.0 GiB of weights on each of 2 GPUs, whatever its"),
        (SAFE_LORA, 0, 10.2, 9, f"weights: {WITHOUT} less of L."),
        (SOME, 0, 10.2, 9, "weights: take --select all, which reads less of L."),
        # No memory that could be set is small enough.
        (SAFE_LORA, 1, 10.2, 9, f"weights: {WITHOUT} neither Ĉ nor V."),
        (SOME, 1, 10.2, 9, "weights: take --select all, which reads neither Ĉ nor V."),
        (SAFE_LORA, 1, 10.4648, 9, f"weights: {WITHOUT}"),
        (SAFE_LORA, 1, 10.46484375, 9, f"set --projector-memory to {300 * MIB} or more, {REST} --method"),
        (SOME, 1, 10.46484375, 9, f"set --projector-memory to {300 * MIB} or more, {REST} --select all,"),
        (SOME, 1, 4.96484375, 7, f"of 2 GPUs: set --projector-memory to {300 * MIB} or more, {REST}"),
    ],
)
def test_advice_where_a_gate_does_not_fit(
    policy: Policy, operator: int, memory: float, weights: int, told: str | None
) -> None:
    """The gate with all of its projectors takes as much as there is; its smallest memory is 300 MiB."""
    placed = dataclasses.replace(PLACED, device_bytes=500 * MIB, transient=0)
    found = dataclasses.replace(
        PLAN, on_gpu=True, held=CacheBytes(operator=operator), placement=placed,
        gpu_memory=int(memory * GIB), weight_bytes=weights * GIB,
    )  # fmt: skip
    assert [told in line for line in plan._advice(found, policy) if told] == [True] * (told is not None)
    assert bool(plan._advice(found, policy)) == (told is not None)


def test_spreads_and_figures_of_a_calibration() -> None:
    assert calibrate._cell(0.12345) == "0.1235"
    assert calibrate._cell(Spread(0.1, 0.25, 1.0)) == "0.1000–0.2500–1.0000"


@pytest.mark.parametrize(
    ("ladder", "title"),
    [
        ("as-uploaded,safe-lora", "x: loyalty drop, nats per token, at most 0.02 passes"),
        (
            "as-uploaded,as-uploaded+opinion",
            "x: loyalty drop, nats per token, at most 0.02 passes, with a second opinion every score",
        ),
    ],
)
def test_the_title_over_an_exam_says_what_passes(
    ladder: str, title: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    rungs, far, near = parse(ladder, Policy()), Score(0.3, 0.3, 0.3, 10), Score(0.01, 0.01, 0.01, 10)
    verdict = sit(rungs, lambda rung: near if rung.select == "all" else far, 0.02)
    assert verdict.policy is not None
    tables_exam.print_verdict("x", verdict)
    out = capsys.readouterr().out
    assert " ".join(out.split()).startswith(f"{title} ┏")
    assert ("│ by opinion │" in out) == ladder.endswith("+opinion") != ("│ passed " in out)


def test_a_policy_of_the_audit_log_in_short() -> None:
    policy = {"method": "input-removal", "select": "all", "energy": 0.1, "mode": "report-only"}
    record = {"policy": policy, "override": True}
    short = "input-removal all energy=0.2→0.1 UNPROJECTED OVERRIDE"
    assert audit_table._policy(record, {"energy": 0.2}) == short
    assert audit_table._policy({**record, "reason": "so\n"}, {"energy": 0.2}) == f"{short} ('so\\n')"
    told = audit_table._policy({"policy": policy, "reason": "rollback to version 1"}, {})
    assert told == "input-removal all energy=0.1 UNPROJECTED (rollback to version 1)"
    record["policy"] = Policy(select="none", opinion=True).to_mapping()
    caps = "max_relative_norm=1 max_total_norm=1"
    assert audit_table._policy(record, {}) == f"nothing projected {caps} second opinion OVERRIDE"
    record["policy"] = {"mode": "audit", "method": "none of ours"}
    assert audit_table._policy(record, {}) == "none of ours UNPROJECTED OVERRIDE"
    assert audit_table._policy({"policy": "damaged"}, {}) == audit_table._policy({}, {}) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), ("x", "x"), ("\x1b[2J", "'\\x1b[2J'"), (3, "3"), (True, "true"), (["a", "\n"], "a, '\\n'"),
     ({"a": 1}, '{"a": 1}'), ([], "")],
)  # fmt: skip
def test_a_value_of_the_audit_log(value: Any, text: str) -> None:
    assert audit_table._cell(value) == text


@pytest.mark.parametrize("columns", [120, 160])
def test_the_table_of_the_audit_log_breaks_no_time(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    policy = {"method": "input-removal", "select": "threshold", "energy": 0.8, "threshold": 0.5,
              "max_relative_norm": 0.042, "max_total_norm": 0.006}  # fmt: skip
    record = {
        "time": "2026-03-04T05:06:07.891011+00:00", "actor": "a-long-tenant/a-long-key-of-it",
        "action": "delete-version", "adapter": "a-long-tenant/summaries-of-orders", "version": 117,
        "digest": "0123456789abcdef" * 4, "policy": policy, "decision": "refused", "count": 12,
        "reasons": ["modules_to_save", "rank_mismatch"], "override": True, "reason": "as agreed with them",
    }  # fmt: skip
    assert audit_table.print_records([(record, {"energy": 0.2})]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    for whole in ("2026-03-04 05:06:07Z", "delete-version", " 117 ", "0123456789ab"):
        assert any(whole in line for line in lines), whole


def test_the_policy_before_is_that_of_the_last_acceptance() -> None:
    first, second, third = {"energy": 0.1}, {"energy": 0.2}, {"energy": 0.3}
    records: list[dict[str, Any]] = [
        {"adapter": "x", "policy": first, "decision": "accepted"},
        {"adapter": "x", "policy": second, "decision": "refused"},
        {"adapter": "y", "policy": third, "decision": "accepted"},
        {"adapter": "x", "policy": None, "decision": "accepted"},
        {"adapter": "x", "policy": third, "decision": "accepted"},
        {"adapter": "x"},
    ]
    before = [judged[1] for judged in audit._with_policy_before(records)]
    assert before == [{}, first, {}, first, first, third]
