"""All adapters of a folder: names, the catalogue, what a second run does, and processes that die."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import safelora_vllm as sl
from safelora_vllm.bulk import job as job_module
from safelora_vllm.bulk import processes
from safelora_vllm.bulk.catalogue import Catalogue, ProjectionRecord
from safelora_vllm.bulk.inputs import find_inputs
from safelora_vllm.cli.main import main
from safelora_vllm.errors import UsageError
from safelora_vllm.projectors.cache import ProjectorCache
from tests.tiny import Draft, lora, lora_config

ROOT = Path(__file__).parents[1]
Project = Callable[..., sl.BulkReport]


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    """Two sound adapters, one of them an archive; one that is refused; and a file that is none."""
    folder = tmp_path / "uploads"
    Draft(tensors=lora(seed=1)).write(folder / "first")
    Draft(tensors=lora(seed=2)).write(tmp_path / "second")
    shutil.make_archive(str(folder / "second"), "gztar", tmp_path, "second")
    Draft(lora_config(use_dora=True)).write(folder / "third")
    (folder / "README.md").write_text("what these are")
    (folder / ".hidden").mkdir()
    return folder


@pytest.fixture
def project(uploads: Path, cache: ProjectorCache, tmp_path: Path) -> Project:
    """Project the uploads into ``tmp_path/out``."""
    return lambda **options: sl.project_adapters(uploads, cache.folder, tmp_path / "out", **options)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that reached the gate, in this process."""
    names: list[str] = []
    admit = job_module.admit

    def count(path: Any, name: str, *rest: Any) -> Any:
        names.append(name)
        return admit(path, name, *rest)

    monkeypatch.setattr(job_module, "admit", count)
    return names


def answers(report: sl.BulkReport) -> dict[str, str]:
    return {record.name: record.answer for record in report.records}


ALL = {"first": "accepted", "second": "accepted", "third": "refused"}


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("jobs", [1, 2])
def test_each_result_is_that_of_its_own_command(
    jobs: int, project: Project, uploads: Path, cache: ProjectorCache, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    report = project(jobs=jobs)
    assert answers(report) == ALL and report.ignored == ("README.md",) and not report.accepted
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"first", "second", ".catalogue"}
    for name, path in (("first", "first"), ("second", "second.tar.gz")):
        alone = sl.project_adapter(uploads / path, cache, tmp_path / "alone" / name)
        assert files_below(out / name) == files_below(tmp_path / "alone" / name)
        record = next(record for record in report.records if record.name == name)
        assert (record.digest, record.modules, record.projected) == (alone.digest, 14, 14)
        assert record.seconds > 0 and record.output_digest
    refused = report.records[2]
    assert [reason.code for reason in refused.reasons] == ["dora"] and refused.output_digest == ""
    for record in report.records:
        data = json.loads((out / ".catalogue" / f"{record.name}.json").read_bytes())
        assert data.pop("format") == 1 and ProjectionRecord.from_dict(data) == record
    assert torch.get_num_threads() == threads


def test_a_second_run_does_nothing(project: Project, judged: list[str], tmp_path: Path) -> None:
    first = project()
    assert judged == ["first", "second", "third"] and first.unchanged == frozenset()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.joinpath("out").rglob("*")}
    again = project()
    assert again.records == first.records and again.unchanged == set(ALL) and len(judged) == 3
    after = {path: path.stat().st_mtime_ns for path in before}
    del before[tmp_path / "out" / ".catalogue" / ".lock"], after[tmp_path / "out" / ".catalogue" / ".lock"]
    assert {p: t for p, t in after.items() if p.is_file()} == {p: t for p, t in before.items() if p.is_file()}


def test_what_changed_is_done_again(
    project: Project, judged: list[str], uploads: Path, tmp_path: Path
) -> None:
    project()
    judged.clear()
    shutil.rmtree(uploads / "first")
    Draft(tensors=lora(seed=9)).write(uploads / "first")
    report = project()
    assert judged == ["first"] and report.unchanged == {"second", "third"}
    (tmp_path / "out" / "second" / "adapter_model.safetensors").write_bytes(b"cut")
    judged.clear()
    assert answers(project()) == ALL and judged == ["second"]
    judged.clear()
    shutil.rmtree(uploads / "third")
    Draft().write(uploads / "third")
    assert answers(project()) == {**ALL, "third": "accepted"} and judged == ["third"]
    judged.clear()
    (tmp_path / "out" / ".catalogue" / "first.json").write_text("{")
    assert answers(project())["first"] == "accepted" and judged == ["first"]


def test_a_changed_policy_does_all_again(project: Project, judged: list[str], tmp_path: Path) -> None:
    project()
    before = files_below(tmp_path / "out" / "first")
    assert answers(project(policy=sl.Policy(energy=0.5))) == ALL and len(judged) == 6
    assert files_below(tmp_path / "out" / "first") != before
    # What is refused now leaves no older result behind.
    assert set(answers(project(policy=sl.Policy(max_total_norm=1e-9))).values()) == {"refused"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".catalogue"}
    report = project(policy=sl.Policy(mode="report-only", max_total_norm=1e-9))
    assert answers(report) == ALL and report.records[0].reasons[0].code == "total_norm"
    assert project(base_model="org/other", policy=sl.Policy(mode="report-only")).unchanged == frozenset()


def test_an_unreadable_adapter_is_looked_at_each_time(project: Project, uploads: Path) -> None:
    (uploads / "first" / "adapter_config.json").unlink()
    (uploads / "notes").mkdir()
    os.mkfifo(uploads / "pipe.tar")
    for _ in range(2):
        report = project()
        codes = {record.name: [reason.code for reason in record.reasons] for record in report.records}
        assert codes == {
            "first": ["missing_file"], "notes": ["missing_file"], "pipe": ["not_regular_file"], "second": [],
            "third": ["dora"],
        }  # fmt: skip
        assert report.unchanged <= {"second", "third"}


@pytest.mark.parametrize("archive", ["first.zip", "first.tar", "first.TGZ"])
def test_a_folder_and_an_archive_of_one_name(archive: str, uploads: Path, project: Project) -> None:
    (uploads / archive).write_bytes(b"")
    with pytest.raises(UsageError, match=f"first and {archive} in .* would both be 'first': rename"):
        project()


def test_links_stay_in_the_folder(uploads: Path, project: Project, tmp_path: Path) -> None:
    Draft().write(tmp_path / "others")
    (uploads / "inside").symlink_to("first")
    (uploads / "outside").symlink_to(tmp_path / "others")
    (uploads / "outside2.zip").symlink_to(tmp_path / "others")
    (uploads / "nowhere").symlink_to("nothing")
    (uploads / "circle").symlink_to("circle")
    report = project()
    reasons = {record.name: record.reasons for record in report.records}
    assert answers(report)["inside"] == "accepted"
    for name, words in (
        ("outside", "leaves"), ("outside2.zip", "leaves"), ("nowhere", "nowhere"), ("circle", "nowhere"),
    ):  # fmt: skip
        assert [reason.code for reason in reasons[name]] == ["not_regular_file"], name
        assert words in reasons[name][0].message


def test_folders_that_cannot_be_used(
    uploads: Path, cache: ProjectorCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path, out: Path, told: str) -> None:
        with pytest.raises(UsageError, match=told):
            sl.project_adapters(folder, cache, out)

    refused(tmp_path / "none", tmp_path / "out", "cannot be read .*expected a folder of adapters")
    refused(uploads / "README.md", tmp_path / "out", "cannot be read")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "has no adapters: expected folders, or")
    refused(uploads, uploads / "out", "is inside")
    refused(uploads, uploads, "is inside")
    refused(uploads, uploads / "README.md" / "out", "is inside|cannot be written")
    (tmp_path / "file").write_text("")
    refused(uploads, tmp_path / "file", r"cannot be written \(File exists\)")
    (tmp_path / "mine" / "first").mkdir(parents=True)
    refused(uploads, tmp_path / "mine", "mine/first exists and is not in the catalogue: remove it, or")
    assert (tmp_path / "mine" / "first").is_dir() and not (tmp_path / "mine" / "second").exists()
    (uploads / ("x" * 253)).mkdir()
    refused(uploads, tmp_path / "out", "is too long: expected at most 250 bytes")

    def denied(_: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", denied)
    refused(uploads, tmp_path / "out", r"cannot be read \(Permission denied\)")


def test_names_that_are_no_text(tmp_path: Path, cache: ProjectorCache, capsys: Any) -> None:
    name = os.fsdecode(b"\xff\n")
    Draft(lora_config(use_dora=True)).write(tmp_path / "uploads" / name)
    options = ["--projectors", str(cache.folder), "--out", str(tmp_path / "out")]
    assert main(["project", "--all", str(tmp_path / "uploads"), *options]) == 3
    assert "\\udcff\\n" in capsys.readouterr().out
    report = sl.project_adapters(tmp_path / "uploads", cache, tmp_path / "out")
    assert report.records[0].name == name and report.unchanged == {name}


def test_suffixes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar.gz", "c.tgz", "d.ZIP", "e.safetensors", ".zip", "g.h"):
        (tmp_path / name).write_text("")
    (tmp_path / "i.zip").mkdir()
    (tmp_path / "k10").mkdir()
    (tmp_path / "k9").mkdir()
    inputs, others = find_inputs(tmp_path)
    assert [found.name for found in inputs] == ["a", "b", "c", "d", "i.zip", "k10", "k9"]
    assert others == ["e.safetensors", "g.h"]


def test_an_adapter_that_breaks_the_gate_does_not_stop_the_others(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    admit = job_module.admit

    def broken(path: Any, name: str, *rest: Any) -> Any:
        if name == "first":
            raise RuntimeError("out of memory")
        return admit(path, name, *rest)

    monkeypatch.setattr(job_module, "admit", broken)
    report = project()
    assert answers(report) == {**ALL, "first": "failed"}
    assert report.records[0].reasons[0] == sl.Reason(
        "internal_error", "RuntimeError: out of memory; report it with the log"
    )
    monkeypatch.setattr(job_module, "admit", admit)
    assert answers(project()) == ALL


def test_an_adapter_that_goes_meanwhile(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project()
    admit = job_module.admit

    def gone(path: Any, name: str, *rest: Any) -> Any:
        if name == "first":
            shutil.rmtree(path)
        return admit(path, name, *rest)

    monkeypatch.setattr(job_module, "admit", gone)
    report = project(policy=sl.Policy(energy=0.3))
    assert answers(report) == {**ALL, "first": "failed"}
    assert report.records[0].reasons[0].code == "not_found"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_damaged_cache_ends_the_run(
    jobs: int, uploads: Path, cache: ProjectorCache, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(cache.folder, tmp_path / "cache"))
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(sl.SafeLoRAError, match="cannot be used") as error:
        sl.project_adapters(uploads, folder, tmp_path / "out", jobs=jobs)
    assert type(error.value).__name__ == "ProjectorCacheError"
    assert not list((tmp_path / "out").glob("[!.]*")) and not list((tmp_path / "out").glob(".new-*"))


def test_a_disk_that_is_full(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    project()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safelora_vllm.store.published.write_file", full)
    with pytest.raises(UsageError, match=r"out cannot be written \(No space left on device\): free space"):
        project(policy=sl.Policy(energy=0.3))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"first", "second", ".catalogue"}
    monkeypatch.undo()
    monkeypatch.setattr("safelora_vllm.bulk.catalogue.replace_file", full)
    with pytest.raises(UsageError, match=r"out cannot be written \(No space left on device\): free space"):
        project(policy=sl.Policy(energy=0.3))


@pytest.mark.parametrize("step", ["started", "moved"])
def test_a_run_that_is_killed_while_it_puts_a_result(
    step: str, project: Project, judged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was written last, the next run does this adapter again and no other."""
    project()
    judged.clear()
    policy = sl.Policy(energy=0.3)
    write, writes = Catalogue._write, []

    def killed(catalogue: Catalogue, record: ProjectionRecord) -> None:
        writes.append(record)
        if len(writes) == (3 if step == "started" else 4):  # the second adapter's first, or its last
            raise KeyboardInterrupt
        write(catalogue, record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Catalogue, "_write", killed)
        project(policy=policy)
    assert judged == ["first", "second"]
    judged.clear()
    report = project(policy=policy)
    assert report.unchanged == {"first"} and judged == ["second", "third"] and answers(report) == ALL
    assert project(policy=policy).unchanged == set(ALL)


def test_two_runs_at_once_lose_nothing(project: Project, tmp_path: Path) -> None:
    reports: list[sl.BulkReport] = []
    threads = [threading.Thread(target=lambda: reports.append(project())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers(report) for report in reports] == [ALL, ALL]
    assert project().unchanged == set(ALL)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"first", "second", ".catalogue"}


def children() -> list[int]:
    """The worker processes of this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes()
            if parent == os.getpid() and b"worker_process" in command:
                found.append(int(folder.name))
    return found


class _Deadly(processes._Process):
    """Kills its process as soon as it is given an adapter of one of these names, each time."""

    victims: list[str]

    def ask(self, message: bytes) -> dict[str, Any] | None:
        given = json.loads(message).get("name")
        if given is not None and given in self.victims:
            self.victims.remove(given)
            os.kill(self._process.pid, signal.SIGKILL)
        return super().ask(message)


def test_processes_that_are_killed(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """kill -9: its adapter is given to one more process, and recorded as failed if that dies too."""
    _Deadly.victims = ["first", "second", "second"]
    monkeypatch.setattr(processes, "_Process", _Deadly)
    report = project(jobs=2)
    assert answers(report) == {**ALL, "second": "failed"} and _Deadly.victims == []
    assert not children()
    (reason,) = report.records[1].reasons
    assert reason.code == "worker_died" and "ended 2 times, last with code -9" in reason.message
    assert Catalogue(tmp_path / "out").get("second") == report.records[1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"first", ".catalogue"}
    report = project()
    assert answers(report) == ALL and report.unchanged == {"first", "third"}


def test_a_process_that_cannot_start(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.sys, "executable", shutil.which("false"))
    with pytest.raises(UsageError, match="ended with code 1 before it had its projectors in memory"):
        project(jobs=2)
    monkeypatch.setattr(processes.sys, "executable", "/nowhere/python")
    with pytest.raises(UsageError, match="a process cannot be started"):
        project(jobs=2)


def test_the_command_that_is_killed_leaves_no_process_and_no_half_result(
    uploads: Path, cache: ProjectorCache, tmp_path: Path
) -> None:
    for number in range(30):
        Draft(tensors=lora(seed=number)).write(uploads / f"more-{number}")
    command = [
        sys.executable, "-m", "safelora_vllm.cli", "project", "--all", str(uploads), "--jobs", "2",
        "--projectors", str(cache.folder), "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    catalogue = tmp_path / "out" / ".catalogue"
    deadline = time.monotonic() + 120
    while len(list(catalogue.glob("*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    running.kill()
    running.wait()
    done = len(list(catalogue.glob("*.json")))
    assert done >= 4
    time.sleep(1.0)  # its workers end with the adapter that they are at
    for folder in (tmp_path / "out").glob("[!.]*"):
        assert len(list(folder.iterdir())) == 3
    report = sl.project_adapters(uploads, cache, tmp_path / "out")
    assert report.count("accepted") == 32 and len(report.unchanged) >= 4


@pytest.fixture
def run(
    cache: ProjectorCache, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("COLUMNS", "120")

    def call(*options: str) -> tuple[int, str, str]:
        code = main(["project", "--projectors", str(cache.folder), "--out", str(tmp_path / "out"), *options])
        return code, *capsys.readouterr()

    return call


def test_the_command(run: Callable[..., tuple[int, str, str]], uploads: Path) -> None:
    code, out, _ = run("--all", str(uploads))
    assert code == 3
    assert "3 adapters: 2 accepted, 1 refused, 0 failed; 0 of them as before" in out
    assert "[dora]" in out and "left out, neither folder nor archive: README.md" in out and "first" not in out
    code, out, _ = run("--all", str(uploads), "--json")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 3 and [record["name"] for record in records] == ["first", "second", "third"]
    assert all(record["unchanged"] for record in records)
    assert records[2]["reasons"][0]["code"] == "dora"
    shutil.rmtree(uploads / "third")
    code, out, _ = run("--all", str(uploads), "--mode", "report-only")
    assert code == 0 and "UNPROJECTED" in out


def test_the_exit_code_of_a_failure(
    run: Callable[..., tuple[int, str, str]], uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("x")

    monkeypatch.setattr(job_module, "admit", broken)
    code, out, _ = run("--all", str(uploads))
    assert code == 1 and "3 failed" in out and "[internal_error] RuntimeError: x" in out


def test_a_long_table_is_cut(
    run: Callable[..., tuple[int, str, str]], uploads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safelora_vllm.cli.tables._MOST_ROWS", 1)
    (uploads / "fourth").mkdir()
    _, out, _ = run("--all", str(uploads))
    assert "and 1 more that were not accepted" in out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "expected either an adapter or --all with a folder"),
        (["{}/first", "--all", "{}"], "expected either an adapter or --all with a folder"),
        (["{}/first", "--jobs", "2"], "--jobs has no effect without --all: leave it out"),
        (["{}/first", "--json"], "--json has no effect without --all"),
        (["{}/first", "--ray", "auto"], "--ray has no effect without --all"),
        (["--all", "{}", "--jobs", "0"], "--jobs is 0: expected 1 or more"),
        (["--all", "{}", "--projector-memory", "0"], "--projector-memory is 0: expected 1 or more"),
    ],
)
def test_wrong_options(
    options: list[str], told: str, run: Callable[..., tuple[int, str, str]], uploads: Path
) -> None:
    code, _, error = run(*(option.format(uploads) for option in options))
    assert code == 2 and told in error


def test_little_projector_memory_changes_nothing(project: Project, tmp_path: Path) -> None:
    project()
    before = files_below(tmp_path / "out" / "first")
    shutil.rmtree(tmp_path / "out")
    project(projector_memory=2**24)
    assert files_below(tmp_path / "out" / "first") == before


def test_ray_that_is_not_installed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"Ray cannot be imported .*pip install '\.\[ray\]'"):
        project(ray="local")
