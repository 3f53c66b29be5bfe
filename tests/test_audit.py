"""The audit log: nothing lost, nothing doubled, nothing torn; and the command that shows it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import os
import re
import signal
import stat
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelora_vllm import durations
from safelora_vllm.cli.audit import add_parser
from safelora_vllm.durations import parse_since
from safelora_vllm.errors import StoreUnavailable, UsageError
from safelora_vllm.policy import Policy
from safelora_vllm.store import audit_log as audit
from safelora_vllm.store.audit_log import AuditLog

_PROCESSES, _RECORDS = 4, 200
# Processes of their own, not forks of this one.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["safelora_vllm.store.audit_log"])
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


class Clock(datetime):
    """A ``datetime`` whose present is set by the test."""

    present = datetime(2026, 1, 31, 12, 0, 0, 5, tzinfo=UTC)

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return cls.present.astimezone(tz)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    for module in (audit, durations):
        monkeypatch.setattr(module, "datetime", Clock)
    monkeypatch.setattr(Clock, "present", Clock.present)
    return Clock


def write_many(folder: Path, writer: int, start: Barrier) -> None:
    """In a process of its own: records with tiny files, all processes at the same moment."""
    log = AuditLog(folder, max_bytes=2000)
    start.wait(60)
    for number in range(_RECORDS):
        log.record(f"admin/{writer}", "load", f"acme/{number}", reasons=["x" * (number % 50)])


def die_in_the_middle_of_a_line(folder: Path) -> None:
    """In a process of its own: half of a record reaches the file, then kill -9."""
    write = os.write

    def killing(file: int, data: bytes) -> int:
        write(file, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    os.write = killing  # type: ignore[assignment]
    AuditLog(folder).record("admin/alice", "load", "torn")


def adapters(log: AuditLog, **limits: Any) -> list[str]:
    return [record["adapter"] for record in log.read(**limits)]


@pytest.mark.usefixtures("clock")
def test_a_record_is_one_line_of_json(tmp_path: Path) -> None:
    folder = tmp_path / "store" / "audit"
    AuditLog(folder).record("acme/ci", "load", "acme/a", decision="refused", reasons=["rank"], rank=None)
    assert (folder / "audit.jsonl").read_text() == (
        '{"time": "2026-01-31T12:00:00.000005+00:00", "actor": "acme/ci", "action": "load", '
        '"adapter": "acme/a", "decision": "refused", "reasons": ["rank"], "rank": null}\n'
    )


def test_only_the_owner_can_read_it(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        log = AuditLog(tmp_path / "audit", max_bytes=1)
        for name in "abc":
            log.record("admin/alice", "load", name)
    finally:
        os.umask(umask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in log.folder.iterdir()}
    assert len(modes) == 4 and set(modes.values()) == {0o600}
    assert stat.S_IMODE(log.folder.stat().st_mode) == 0o700


def test_many_processes_write_and_rotate_at_once(tmp_path: Path) -> None:
    """While a reader looks on, who never sees a line twice or damaged."""
    start = _CONTEXT.Barrier(_PROCESSES)
    processes = [_CONTEXT.Process(target=write_many, args=(tmp_path, i, start)) for i in range(_PROCESSES)]
    for process in processes:
        process.start()
    log = AuditLog(tmp_path)
    while any(process.is_alive() for process in processes):
        seen = [(record["actor"], record["adapter"]) for record in log.read()]
        assert len(seen) == len(set(seen))
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    records = list(log.read())
    expected = {(f"admin/{i}", f"acme/{n}") for i in range(_PROCESSES) for n in range(_RECORDS)}
    assert sorted((r["actor"], r["adapter"]) for r in records) == sorted(expected)
    times = [record["time"] for record in records]
    assert times == sorted(times)
    files = [path for path in tmp_path.iterdir() if path.name != ".lock"]
    assert len(files) > 20 and all(path.stat().st_size <= 2000 for path in files)
    lines = [line for path in files for line in path.read_bytes().splitlines()]
    assert len([json.loads(line) for line in lines]) == _PROCESSES * _RECORDS


def test_threads_of_one_process_keep_each_other_out(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, max_bytes=500)

    def write(thread: int) -> None:
        for number in range(50):
            log.record("admin/alice", "load", f"{thread}.{number}")

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(adapters(log)) == sorted(f"{i}.{n}" for i in range(4) for n in range(50))


def test_a_killed_writer_costs_its_own_record_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(tmp_path)
    log.record("admin/alice", "load", "before")
    for _ in range(2):
        process = _CONTEXT.Process(target=die_in_the_middle_of_a_line, args=(tmp_path,))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        log.record("admin/alice", "load", "after")
    assert adapters(log) == ["before", "after", "after"]
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING and "passed over 2 damaged lines" in warning.getMessage()


def test_lines_that_are_no_records_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = AuditLog(tmp_path)
    log.record("admin/alice", "load", "a")
    time = '"time": "2026-01-31T12:00:00"'
    damaged = [
        b"\0\0\0", b"\xff\xfe", b"", b"5", b"null", b"[]", b"{}", b'{"time": 5}', b'{"time": "noon"}',
        f"{{{time}}}".encode(),  # without a time zone it cannot be compared
    ]  # fmt: skip
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b"\n".join(damaged))
    log.record("admin/alice", "load", "b")
    assert adapters(log, since=datetime(2026, 1, 1, tzinfo=UTC)) == ["a", "b"]
    assert f"passed over {len(damaged)} damaged lines" in caplog.text


def test_full_files_sort_by_time_even_if_the_clock_was_set_back(tmp_path: Path, clock: type[Clock]) -> None:
    log = AuditLog(tmp_path, max_bytes=1)
    for name, step in (("a", 1), ("b", 1), ("c", 0), ("d", -3600), ("e", 1), ("f", 7200)):
        clock.present += timedelta(seconds=step)
        log.record("admin/alice", "load", name)
    (tmp_path / "audit-of-accounts.jsonl").write_text('{"time": "2026-01-31T12:00:00Z", "adapter": "x"}\n')
    assert [path.name for path in sorted(tmp_path.glob("audit-2*"))] == [
        "audit-20260131T120002.000005Z.jsonl",
        "audit-20260131T120002.000006Z.jsonl",
        "audit-20260131T120002.000007Z.jsonl",
        "audit-20260131T120002.000008Z.jsonl",
        "audit-20260131T130003.000005Z.jsonl",
    ]
    assert adapters(log) == list("abcdef")


def test_since_and_until(tmp_path: Path, clock: type[Clock]) -> None:
    log = AuditLog(tmp_path, max_bytes=250)  # two records a file
    times = []
    for name in "abcdefg":
        clock.present += timedelta(hours=1)
        times.append(clock.present)
        log.record("admin/alice", "load", name)
    assert len(list(tmp_path.glob("audit-2*"))) == 3
    for i in range(7):
        assert adapters(log, since=times[i]) == list("abcdefg"[i:])
        assert adapters(log, until=times[i]) == list("abcdefg"[:i])
        assert adapters(log, since=times[1], until=times[i]) == list("abcdefg"[1:i])
    assert adapters(AuditLog(tmp_path / "none")) == []


def test_files_that_were_closed_before_are_not_read(tmp_path: Path, clock: type[Clock]) -> None:
    log = AuditLog(tmp_path, max_bytes=1)
    for name in "abc":
        clock.present += timedelta(hours=1)
        log.record("admin/alice", "load", name)
    oldest = min(tmp_path.glob("audit-2*"))
    oldest.unlink()
    oldest.mkdir()  # opening it would raise
    assert adapters(log, since=clock.present) == ["c"]


def test_a_reader_does_not_miss_a_file_that_is_rotated_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path, max_bytes=1)
    log.record("admin/alice", "load", "a")
    opened: list[Any] = []
    inner = AuditLog._open_current

    def rotate_first(self: AuditLog) -> Any:
        if not opened:
            self.record("admin/alice", "load", "b")
        opened.append(inner(self))
        return opened[-1]

    monkeypatch.setattr(AuditLog, "_open_current", rotate_first)
    assert adapters(log) == ["a", "b"]
    assert len(opened) == 2 and all(file.closed for file in opened)


def test_a_reader_who_stops_early_leaves_no_file_open(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, max_bytes=1)
    for name in "ab":
        log.record("admin/alice", "load", name)
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    records = log.read()
    assert next(records)["adapter"] == "a"
    records.close()  # type: ignore[attr-defined]
    assert set(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


@given(name=st.text(), key=st.text(min_size=1), value=_JSON)
def test_any_name_and_value_survive(
    name: str, key: str, value: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = AuditLog(tmp_path_factory.mktemp("log"))
    for text in (name, name + "\ud800\n\u2028\x00\x1b[2J", "next"):
        log.record(text, "load", text, detail={key: value})
    assert [r["adapter"] for r in log.read()] == [r["actor"] for r in log.read()]
    assert adapters(log) == [name, name + "\ud800\n\u2028\x00\x1b[2J", "next"]
    assert [record["detail"] for record in log.read()] == [{key: value}] * 3
    data = (log.folder / "audit.jsonl").read_bytes()
    assert data.isascii() and data.count(b"\n") == len(data.splitlines()) == 3


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), b"bytes", Path(), {1, 2}, object()],
    ids=["nan", "inf", "bytes", "path", "set", "object"],  # an object's address differs between processes
)
def test_what_json_does_not_have_is_the_callers_mistake(value: Any, tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    with pytest.raises((TypeError, ValueError)):
        log.record("admin/alice", "load", "a", detail=value)
    log.record("admin/alice", "load", "b")
    assert adapters(log) == ["b"]


def test_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    full = AuditLog(tmp_path / "full")
    full.folder.mkdir()
    (full.folder / "audit.jsonl").symlink_to("/dev/full")
    (tmp_path / "file").touch()
    for log, cause in ((full, "No space left"), (AuditLog(tmp_path / "file" / "audit"), "Not a directory")):
        with pytest.raises(StoreUnavailable, match=rf"{log.folder} cannot be written \({cause}.*free space"):
            log.record("admin/alice", "load", "a")


def test_a_disk_that_becomes_full_within_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, write = AuditLog(tmp_path), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda file, data: write(file, data[:10]))
        with pytest.raises(StoreUnavailable, match="No space left"):
            log.record("admin/alice", "load", "a")
    log.record("admin/alice", "load", "b")
    assert adapters(log) == ["b"]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", Clock.present - timedelta(seconds=90)),
        ("15m", Clock.present - timedelta(minutes=15)),
        ("2h", Clock.present - timedelta(hours=2)),
        ("7d", Clock.present - timedelta(days=7)),
        ("0s", Clock.present),
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31T12:30", datetime(2026, 1, 31, 12, 30, tzinfo=UTC)),
        ("2026-01-31 12:30:01.5", datetime(2026, 1, 31, 12, 30, 1, 500_000, tzinfo=UTC)),
        ("2026-01-31T12:30:00Z", datetime(2026, 1, 31, 12, 30, tzinfo=UTC)),
        ("2026-01-31T12:30:00+02:00", datetime(2026, 1, 31, 10, 30, tzinfo=UTC)),
    ],
)
def test_times_that_a_user_can_give(text: str, expected: datetime) -> None:
    found = parse_since(text)
    assert found == expected and found.utcoffset() == timedelta(0)


@pytest.mark.parametrize(
    "text",
    ["", "s", "2", "2w", "-2h", "2.5h", "2h ", "2h\n", "٣h", "yesterday", "2026-02-30", "9" * 9 + "d",
     "9" * 400 + "d", "9" * 5000 + "s", "0001-01-01T00:00+05:00"],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a valid time: expected 90s") as error:
        parse_since(text)
    assert len(str(error.value)) < 250


Run = Callable[..., int]


@pytest.fixture
def store(tmp_path: Path, clock: type[Clock]) -> Path:
    """An adapter store with four records, an hour apart."""
    log = AuditLog(tmp_path / "audit")
    for actor, action, adapter, details in (
        ("admin/alice", "load", "shared", {"decision": "projected", "reasons": []}),
        ("acme/ci", "load", "acme/a", {"decision": "refused", "reasons": ["rank", "dora"]}),
        ("acme/ci", "unload", "acme/b", {"reasons": None}),
        ("acme/ci", "load", "[red]\x1b[2J\n", {"decision": "kept"}),
    ):
        log.record(actor, action, adapter, **details)
        clock.present += timedelta(hours=1)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command as the command line would, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers(required=True))

    def call(*options: str) -> int:
        args = parser.parse_args(["audit", *options])
        return int(args.run(args))

    return call


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [0, 1, 2, 3]),
        (["--adapter", "acme/a"], [1]),
        (["--actor", "acme/ci"], [1, 2, 3]),
        (["--action", "load", "--actor", "acme/ci"], [1, 3]),
        (["--since", "3h"], [1, 2, 3]),
        (["--until", "2026-01-31T14:00"], [0, 1]),
        (["--since", "3h", "--until", "1h"], [1, 2]),
    ],
    ids=str,
)
def test_the_command_filters(
    options: list[str], expected: list[int], store: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--adapter-store", str(store), "--json", *options) == 0
    out, err = capsys.readouterr()
    everything = (store / "audit" / "audit.jsonl").read_text().splitlines()
    assert out.splitlines() == [everything[i] for i in expected] and err == ""


def test_the_command_prints_a_table(store: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--adapter-store", str(store)) == 0
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    heads = ["time", "actor", "action", "adapter", "version", "digest", "policy", "decision", "reasons"]
    assert re.findall(r"[a-z]+", lines[1]) == heads
    (refused,) = (line for line in lines if "acme/a" in line)
    assert re.split(r"\s*│\s*", refused.strip("│ ")) == [
        "2026-01-31 13:00:00Z", "acme/ci", "load", "acme/a", "", "", "", "refused",
        "rank, dora",
    ]  # fmt: skip
    assert r"'[red]\x1b[2J\n'" in out and "\x1b" not in out  # neither markup nor escapes are obeyed


def test_the_table_shows_overrides(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    log = AuditLog(tmp_path / "audit")
    rules = {"method": "safe-lora", "select": "all"}
    log.record("ops", "policy", "a", decision="accepted", version=2, digest="d" * 64, policy=rules)
    log.record(
        "ops",
        "policy",
        "b",
        decision="accepted",
        policy={**rules, "mode": "audit", "opinion": True},
        override=True,
        reason="test",
    )
    assert run("--adapter-store", str(tmp_path)) == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if "ops" in line)
    assert f"{'d' * 12} " in first and "safe-lora all" in first and "OVERRIDE" not in first
    assert "safe-lora all UNPROJECTED second opinion OVERRIDE (test)" in second


def test_the_table_shows_the_figures_of_a_policy_and_what_changed(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    log = AuditLog(tmp_path / "audit")

    def record(name: str, decision: str = "accepted", **fields: Any) -> None:
        policy = dataclasses.asdict(Policy(**fields))
        log.record("ops", "policy", name, decision=decision, policy=policy)

    record("a")
    record("a", energy=0.5)
    record("a", decision="refused", energy=0.9, max_total_norm=0.1)
    record("a", energy=0.4, max_total_norm=0.25)
    record("a", energy=0.4)
    record("b", method="safe-lora", max_relative_norm=0.5)
    record("b", method="safe-lora", threshold=0.5, max_relative_norm=0.5)
    record("b", method="safe-lora", select="number", number=3)
    log.record("ops", "policy", "c", decision="accepted", policy={"method": "later", "select": "all"})
    log.record("ops", "delete", "c", decision="removed")
    expected = [
        "input-removal all energy=0.2 max_relative_norm=1 max_total_norm=1",
        "input-removal all energy=0.2→0.5 max_relative_norm=1 max_total_norm=1",
        "input-removal all energy=0.5→0.9 max_relative_norm=1 max_total_norm=1→0.1",
        "input-removal all energy=0.5→0.4 max_relative_norm=1 max_total_norm=1→0.25",
        "input-removal all energy=0.4 max_relative_norm=1 max_total_norm=0.25→1",
        "safe-lora threshold threshold=0.35 max_relative_norm=0.5 max_total_norm=1",
        "safe-lora threshold threshold=0.35→0.5 max_relative_norm=0.5 max_total_norm=1",
        "safe-lora number threshold=0.5→0.35 number=10→3 max_relative_norm=0.5→1 max_total_norm=1",
        "later all",
        "",
    ]

    def policies(*options: str) -> list[str]:
        assert run("--adapter-store", str(tmp_path), *options) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "ops" in line]
        return [line.split("│")[7].strip() for line in lines]

    assert policies() == expected
    assert policies("--adapter", "b") == expected[5:8], "what is left out still counts as before"


@pytest.mark.parametrize("form", [["--json"], []])
def test_nothing_found(form: list[str], store: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--adapter-store", str(store), "--adapter", "nobody's", *form) == 0
    assert capsys.readouterr() == ("", f"no matching record in {store / 'audit'}\n")


def test_no_log_there(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UsageError, match=f"no audit log {tmp_path / 'x' / 'audit'}: expected it in the server's --adapt"
    ):
        run("--adapter-store", str(tmp_path / "x"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=str(tmp_path / "safelora-vllm" / "audit")):
        run()
    with pytest.raises(UsageError, match="is not a valid time"):
        run("--adapter-store", str(tmp_path), "--since", "yesterday")


def test_a_log_of_somebody_else(store: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "audit.jsonl")

    monkeypatch.setattr(Path, "open", denied)  # the tests may run as root, who is never denied
    with pytest.raises(UsageError, match=r"audit\.jsonl cannot be read; run this as the server's user"):
        run("--adapter-store", str(store))


def test_eighty_columns_are_enough(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog(tmp_path / "audit")
    policy = dataclasses.asdict(Policy(energy=0.1, max_total_norm=0.25))
    log.record(
        "admin/alice", "policy", "acme/an-adapter-with-a-name-of-some-length", decision="accepted",
        digest="d" * 64, policy=policy, version=12, override=True, reason="measured on our own tasks",
    )  # fmt: skip
    log.record("server", "rejudge", "[red]\x1b[2J", decision="refused", reasons=["rank", "dora"])
    monkeypatch.setenv("COLUMNS", "80")
    assert run("--adapter-store", str(tmp_path)) == 0
    out, _ = capsys.readouterr()
    assert max(map(len, out.splitlines())) <= 80 and "\x1b" not in out
    text = " ".join(out.split())
    assert "policy accepted: acme/an-adapter-with-a-name-of-some-length version 12, by admin/alice" in text
    assert "policy: input-removal all energy=0.1 max_relative_norm=1 max_total_norm=0.25 OVERRIDE " in text
    assert "(measured on our own tasks) digest: dddddddddddd" in text
    assert r"rejudge refused: '[red]\x1b[2J', by server refused for: rank, dora" in text


def test_an_unknown_action_is_refused(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("--adapter-store", str(tmp_path), "--action", "uplaod")
    assert ended.value.code == 2 and "rejudge" in capsys.readouterr().err


def test_what_was_found_once_is_recorded_once(tmp_path: Path) -> None:
    """By several servers and at each start; another content or other rules are news."""
    for log in (AuditLog(tmp_path), AuditLog(tmp_path)):
        for adapter, found in (("a", "1"), ("b", "1"), ("a", "1"), ("a", "2"), ("a", "2")):
            log.record("server", "load", adapter, once=found)
        log.record("server", "load", "a")
    assert [record["adapter"] for record in AuditLog(tmp_path).read()] == ["a", "b", "a", "a", "a", "a", "a"]
    (tmp_path / "found.json").write_text("[")
    AuditLog(tmp_path).record("server", "load", "b", once="1")
    assert len(list(AuditLog(tmp_path).read())) == 8


def test_a_tenants_newest_refusals(tmp_path: Path) -> None:
    log = AuditLog(tmp_path)
    for number in range(25):
        log.record("acme/ci", "upload", f"acme/{number}", decision="refused", reasons=["rank"], digest="d")
        log.record("acme/ci", "upload", f"acme/{number}", decision="accepted")
        log.record("x/ci", "upload", "x/1", decision="refused", reasons=["quota"])
    log.record("ops", "upload", "shared", decision="refused", reasons=["quota"])
    found = log.refusals("acme")
    assert [record["adapter"] for record in found] == [f"acme/{number}" for number in range(5, 25)]
    assert [*found[0]] == ["time", "action", "adapter", "reasons"] and found[0]["reasons"] == ["rank"]
    assert len(log.refusals("x")) == 20 and log.refusals("y") == log.refusals("../x") == []
    assert sorted(path.name for path in (tmp_path / "refused").iterdir()) == ["acme.json", "x.json"]
    (tmp_path / "refused" / "x.json").write_text("{")
    assert log.refusals("x") == []


@pytest.mark.parametrize("columns", ["80", "200"])
def test_a_line_that_stands_for_many_refusals_says_so(
    columns: str,
    tmp_path: Path,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    log = AuditLog(tmp_path / "audit")
    log.record("acme/ci", "upload", "acme/a", decision="refused", reasons=["quota"], count=990)
    assert run("--adapter-store", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "refused ×990" in out and "quota" in out


@pytest.mark.parametrize("error", [BrokenPipeError(), ValueError("I/O operation on closed file")])
def test_whoever_reads_the_echo_holds_up_nobody(tmp_path: Path, error: Exception) -> None:
    """A full pipe blocks a print: other writers go on meanwhile. A closed one loses no change."""
    others = AuditLog(tmp_path)

    def slow(_: dict[str, Any]) -> None:
        other = threading.Thread(target=others.record, args=("b", "delete", "x"), daemon=True)
        other.start()
        other.join(5)
        assert not other.is_alive()
        raise error

    AuditLog(tmp_path, echo=slow).record("a", "upload", "x")
    assert [record["actor"] for record in others.read()] == ["a", "b"]
