"""The command: exit codes, what is printed where, and what lies on disk afterwards."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from safelora_vllm import __version__
from safelora_vllm.cli.main import main
from safelora_vllm.methods import METHODS
from safelora_vllm.projectors.cache import ProjectorCache
from tests.tiny import Draft, Pair, module_shapes

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(cache: ProjectorCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command on an adapter: exit code, standard output, standard error."""

    def call(command: str, *options: str, adapter: str = "good", projectors: Path = cache.folder) -> Any:
        where = [command, str(tmp_path / adapter), "--projectors", str(projectors)]
        try:
            code = main([*where, *options])
        except SystemExit as error:  # argparse ends the process itself
            assert isinstance(error.code, int)
            code = error.code
        return code, *capsys.readouterr()

    Draft().write(tmp_path / "good")
    bad = Draft()
    bad.config.update(use_dora=True, bias="all")
    bad.write(tmp_path / "bad")
    return call


def test_inspect_prints_a_table_and_the_verdict(run: Run) -> None:
    code, out, _ = run("inspect", "--method", "safe-lora")
    assert code == 0 and "good: accepted" in out and "projected" in out and "kept" in out
    code, out, _ = run("inspect", adapter="bad")
    assert code == 3 and "bad: refused" in out and "[dora]" in out and "[bias]" in out
    code, out, _ = run("inspect", "--max-total-norm", "1e-9")
    assert code == 3 and "modules would have been projected" in out and "[total_norm]" in out


def test_inspect_several_has_a_line_each_and_the_largest_norms(
    run: Run, cache: ProjectorCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["inspect", *(str(tmp_path / name) for name in ("good", "bad"))]
    command += ["--projectors", str(cache.folder)]
    code, out = main(command), capsys.readouterr().out
    assert code == 3 and "good" in out and "refused: " in out and "dora" in out
    single = json.loads(run("inspect", "--json")[1])
    assert f"largest: total norm {single['total_norm']:.4g}, of a module " in out
    assert f"{max(m['relative_norm'] for m in single['modules']):.4g}" in out
    code, out = main([*command, "--json"]), capsys.readouterr().out
    good, bad = map(json.loads, out.splitlines())
    assert code == 3 and good == single and not bad["accepted"]


def test_project_into_what_is_no_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, out, error = run("project", "--out", str(tmp_path / "file" / "out"))
    assert (code, out) == (2, "") and "cannot be written" in error and "another folder as --out" in error


@pytest.mark.parametrize("command", ["inspect", "project", "serve"])
def test_an_option_without_effect_is_wrong_usage(run: Run, tmp_path: Path, command: str) -> None:
    code, _, error = run(
        command, "--number", "3", *(["--out", str(tmp_path / "out")] * (command == "project"))
    )
    assert (
        code == 2
        and "--number has no effect with --select 'all'. Set --select to 'number', or leave --number" in error
        and not (tmp_path / "out").exists()
    )


def test_inspect_json_has_the_keys_that_others_script_against(run: Run, cache: ProjectorCache) -> None:
    code, out, _ = run("inspect", "--json", "--method", "safe-lora", "--select", "number", "--number", "3")
    report = json.loads(out)
    assert code == 0
    promised = ["adapter", "digest", "projectors", "policy", "accepted", "reasons", "total_norm", "signed"]
    promised += ["signed_by", "modules"]
    assert list(report) == promised
    assert (report["adapter"], report["projectors"]) == ("good", cache.id)
    assert report["accepted"] is True and report["reasons"] == []
    assert report["policy"]["select"] == "number" and report["policy"]["number"] == 3
    assert len(report["digest"]) == 64
    assert [module["name"] for module in report["modules"]] == sorted(module_shapes())
    for module in report["modules"]:
        assert list(module) == [
            "name", "rank", "similarity", "null_similarity", "retained", "relative_norm", "decision",
            "similarity_error",
            "uncertain",
        ]  # fmt: skip
    decisions = [module["decision"] for module in report["modules"]]
    assert decisions.count("projected") == 3 and set(decisions) == {"projected", "kept"}


def test_inspect_json_of_a_refused_adapter(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("inspect", "--json", adapter="bad")
    report = json.loads(out)
    assert code == 3 and report["accepted"] is False and report["modules"] == []
    assert sorted(reason["code"] for reason in report["reasons"]) == ["bias", "dora"]
    assert all(list(reason) == ["code", "message"] and reason["message"] for reason in report["reasons"])
    (tmp_path / "empty").mkdir()
    code, out, _ = run("inspect", "--json", adapter="empty")
    assert code == 3 and [reason["code"] for reason in json.loads(out)["reasons"]] == ["missing_file"]


def test_a_function_call_leaves_the_signals_of_its_caller_alone(run: Run) -> None:
    handler = signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python starts
    try:
        run("inspect")
        assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGPIPE, handler)


def test_without_options_input_removal_projects_every_module(run: Run) -> None:
    code, out, _ = run("inspect", "--json")
    report = json.loads(out)
    rules = {name: report["policy"][name] for name in ("method", "energy", "select", "mode")}
    assert code == 0
    assert rules == {"method": "input-removal", "energy": 0.2, "select": "all", "mode": "enforce"}
    assert {module["decision"] for module in report["modules"]} == {"projected"}
    assert all(module["retained"] < 1.0 for module in report["modules"])


def test_inspect_writes_nothing(run: Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    run("inspect")
    assert sorted(tmp_path.rglob("*")) == before


def test_project_writes_a_peft_adapter_with_its_report(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    code, text, _ = run("project", "--out", str(out), "--method", "safe-lora", "--select", "all")
    assert code == 0 and f"14 of 14 modules projected, written to {out}" in text
    assert {path.name for path in out.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "report.json",
    }  # fmt: skip
    assert len(load_file(out / "adapter_model.safetensors")) == 28
    assert list(out.parent.iterdir()) == [out]  # nothing temporary is left


def test_project_says_that_an_adapter_of_zeros_changes_nothing(run: Run, tmp_path: Path) -> None:
    zeros = Draft()
    for name, tensor in zeros.tensors.items():
        tensor.mul_(0.0 if "lora_B" in name else 1.0)
    zeros.write(tmp_path / "zeros")
    code, text, _ = run("project", "--out", str(tmp_path / "out"), adapter="zeros")
    assert code == 0 and "the adapter changes nothing" in text
    _, text, _ = run("project", "--out", str(tmp_path / "other"))
    assert "changes nothing" not in text


def test_project_of_a_refused_adapter_writes_nothing(run: Run, tmp_path: Path) -> None:
    code, text, error = run("project", "--out", str(tmp_path / "out"), adapter="bad")
    assert code == 3 and text == "" and "refused: " in error and "[dora]" in error
    assert {path.name for path in tmp_path.iterdir()} == {"good", "bad"}


def test_project_does_not_touch_an_existing_folder(run: Run, tmp_path: Path) -> None:
    code, _, error = run("project", "--out", str(tmp_path / "bad"))
    assert code == 2 and "exists: remove it, or give another folder as --out" in error


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "none"), ("--select", "some"), ("--mode", "off"), ("--threshold", "x"),
        ("--threshold", "2"), ("--threshold", "nan"), ("--number", "-1"), ("--number", "1.5"),
        ("--energy", "1.5"), ("--max-relative-norm", "-1"), ("--max-relative-norm", "inf"),
        *(("--method", name, "--energy", "0.99") for name in METHODS if name != "safe-lora"),
        ("--unknown",), ("--thresh", "0.3"),
        ("--device", "nonsense"), ("--device", "cuda:99"),
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("json_option", [(), ("--json",)], ids=["table", "json"])
def test_wrong_usage_is_2_with_a_sentence(
    options: tuple[str, ...], json_option: tuple[str, ...], run: Run
) -> None:
    code, out, error = run("inspect", *options, *json_option)
    assert code == 2 and out == "" and error.strip() and "Traceback" not in error


@pytest.mark.parametrize("command", ["inspect", "project"])
def test_input_that_is_not_there_is_2(command: str, run: Run, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out")) if command == "project" else ()
    code, _, error = run(command, *out, adapter="none")
    assert code == 2 and "there is no" in error
    code, _, error = run(command, *out, projectors=tmp_path / "none")
    assert code == 2 and "no projector cache in" in error


@pytest.mark.parametrize(
    "arguments",
    [[], ["nothing"], ["inspect"], ["build", "--base", "x"], ["project", "a", "--projectors", "b"]],
    ids=" ".join,
)
def test_a_command_with_something_missing_is_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and "usage: safelora-vllm" in capsys.readouterr().err


def test_build_errors_are_2(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path / "out")]
    aligned = ["--aligned", str(pair.aligned)]
    assert main(["build", "--base", str(tmp_path / "none"), *aligned, *options]) == 2
    assert main(["build", "--base", str(pair.aligned), *aligned, *options]) == 2
    assert main(["build", "--base", str(pair.base), *aligned, *options, "--exact", "--dtype", "int8"]) == 2
    errors = capsys.readouterr().err
    assert (
        "expected a model folder or a hub id" in errors
        and "V = 0" in errors
        and "--dtype is 'int8'" in errors
    )
    assert not (tmp_path / "out").exists()


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for option, expected in (
        ("--version", __version__),
        ("--help", "build,inspect,project,serve,plan,calibrate,exam"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([option])
        text = capsys.readouterr().out
        assert ended.value.code == 0 and all(word in text for word in expected.split(","))


def test_the_former_name_of_a_mode_is_told(run: Run) -> None:
    code, out, error = run("inspect", "--mode", "audit")
    assert (code, out) == (2, "") and "--mode 'audit' has another name now: use 'report-only'" in error


def test_report_only_writes_it_unprojected_and_says_so(run: Run, tmp_path: Path) -> None:
    code, text, _ = run("project", "--out", str(tmp_path / "out"), "--mode", "report-only")
    assert code == 0 and "written UNPROJECTED to" in text and "would project 14 of 14" in text


def test_help_names_every_policy_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "project", "serve"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        for option in (
            "--method", "--select", "--threshold", "--number", "--energy", "--max-relative-norm",
            "--max-total-norm", "--mode", "--projectors",
        ):  # fmt: skip
            assert option in text


def test_inspect_looks_for_all_adapters_before_it_judges_one(
    cache: ProjectorCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = Draft().write(tmp_path / "sound")
    assert main(["inspect", str(sound), "none", "nor-this", "--projectors", str(cache.folder)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and "there is nothing at 'none', 'nor-this': expected a folder that PEFT saved" in error


@pytest.mark.parametrize(
    "command",
    [["inspect", "--projectors", "p"], ["store", "ls", "--adapter-store"], ["audit", "--adapter-store"]],
)
def test_a_path_that_the_system_does_not_take_is_2(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "x" * 5000]) == 2
    assert "safelora-vllm: " in capsys.readouterr().err


def test_a_name_is_no_markup(run: Run, tmp_path: Path) -> None:
    """Folders have names that others gave them."""
    Draft().write(tmp_path / "runs[v1]\x1b[2J")
    code, text, _ = run("inspect", adapter="runs[v1]\x1b[2J")
    assert code == 0 and "runs[v1]" in text and "\x1b[2J" not in text
