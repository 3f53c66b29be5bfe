"""What each command does with its options: what it calls, what it prints where, and its exit code."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from safelora_vllm.cli import main as command
from safelora_vllm.cli import serve
from safelora_vllm.cli.main import entry, main
from safelora_vllm.cli.options import size, size_text
from safelora_vllm.errors import AdapterRefused, Reason, StoreUnavailable
from safelora_vllm.integration import launch
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.report import ModuleReport, Report

MODULE = ModuleReport("m", 1, 0.5, 0.1, 0.9, 0.2, "projected")
Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def report(accepted: bool = True, policy: Policy | None = None, similarity: float | None = 0.5) -> Report:
    module = ModuleReport("m", 1, similarity, 0.1, 0.9, 0.2, "projected")
    reasons = [] if accepted else [Reason("total_norm", "too large (`max_total_norm`)")]
    return Report("a", "d", "p", policy or Policy(), accepted, reasons, [module], 0.1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], Calls]:
    """Puts an answer in the place of a function of the API; how it was called."""

    def fake(name: str, answer: Callable[..., Any]) -> Calls:
        made: Calls = []

        def called(*args: Any, **options: Any) -> Any:
            made.append((args, options))
            return answer(*args, **options)

        monkeypatch.setattr(f"safelora_vllm.api.{name}", called)
        return made

    return fake


Fake = Callable[[str, Callable[..., Any]], Calls]


def test_build_passes_on_what_was_given_only(calls: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    made = calls("build_projectors", lambda *_, **__: SimpleNamespace(folder="the/cache"))
    pair = ["build", "--base", "b", "--aligned", "a", "--out", "o"]
    assert main(pair) == 0
    advice, written = capsys.readouterr().out.splitlines()
    assert "only pretrained" in advice and written == "projector cache written to the/cache"
    options = ["--modules", "q_proj", "v_proj", "--device", "cuda", "--max-energy", "0.5"]
    assert main([*pair, *options, "--exact", "--dtype", "float16", "--form", "dense"]) == 0
    assert main([*pair, "--exact"]) == 0
    assert [args for args, _ in made] == [("b", "a", "o")] * 3
    plain = {"modules": [], "device": "cpu", "exact": False}
    some = {"modules": ["q_proj", "v_proj"], "device": "cuda", "exact": True, "max_energy": 0.5}
    assert [given for _, given in made] == [
        plain, {**some, "dtype": "float16", "form": "dense"}, {**plain, "exact": True},
    ]  # fmt: skip


@pytest.mark.parametrize(("option", "value"), [("--dtype", "bfloat16"), ("--form", "auto")])
def test_build_refuses_options_that_a_thin_cache_does_not_know(
    option: str, value: str, calls: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also with the value that is the default: somebody gave it."""
    made = calls("build_projectors", lambda *_, **__: None)
    assert main(["build", "--base", "b", "--aligned", "a", "--out", "o", option, value]) == 2
    assert f"{option} has no effect without --exact" in capsys.readouterr().err and made == []


def test_plan_passes_on_its_options(calls: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("ends here")

    made = calls("plan_projectors", refuse)
    assert main(["plan", "--aligned", "a"]) == 2
    options = ["--projectors", "p", "--modules", "q", "--max-energy", "0.5", "--exact", "--lora-rank", "8"]
    options += ["--projector-memory", "2GiB", "--projector-host-memory", "1 KB"]
    assert main(["plan", "--aligned", "a", *options, "--gpu-memory", "1.5", "--device", "cuda"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "safelora-vllm: ends here\n" * 2)
    assert [args for args, _ in made] == [("a", Policy())] * 2
    nothing = {"projectors": None, "modules": [], "max_energy": None, "exact": False, "lora_rank": 16}
    given = {"projectors": "p", "modules": ["q"], "max_energy": 0.5, "exact": True, "lora_rank": 8}
    no_memory = {"projector_memory": None, "projector_host_memory": 0}
    memory = {"projector_memory": 2 * 2**30, "projector_host_memory": 1000}
    assert [options for _, options in made] == [
        {**nothing, **no_memory, "gpu_memory": None, "device": "cpu"},
        {**given, **memory, "gpu_memory": 3 * 2**29, "device": "cuda"},
    ]


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A projector cache that is given stays what was given."""
    monkeypatch.setattr("safelora_vllm.api.opened.opened_cache", lambda given: given)
    monkeypatch.setattr("safelora_vllm.api.opened.warn_of_truncation", lambda *_: None)


@pytest.mark.usefixtures("unopened")
def test_project_passes_on_its_options(calls: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    made = calls("project_adapter", lambda *_, **__: report(similarity=None))
    assert main(["project", "a", "--projectors", "p", "--out", "o"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("1 of 1 modules projected, written to o\nthe adapter changes nothing: ")
    options = ["--base-model", "m", "--device", "cuda", "--energy", "0.1"]
    assert main(["project", "a", "--projectors", "p", "--out", "o", *options]) == 0
    assert made == [
        (("a", "p", "o", Policy()), {"device": "cpu", "base_model": None}),
        (("a", "p", "o", Policy.from_mapping({"energy": 0.1})), {"device": "cuda", "base_model": "m"}),
    ]


@pytest.mark.usefixtures("unopened")
def test_a_refusal_of_project_is_3_and_told_on_standard_error(
    calls: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AdapterRefused(report(accepted=False).reasons)

    calls("project_adapter", refuse)
    assert main(["project", "a", "--projectors", "p", "--out", "o"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "refused: [total_norm] too large (--max-total-norm)\n"


@pytest.mark.parametrize(
    ("accepted", "code"), [((True, True), 0), ((True, False), 3), ((False, True), 3), ((False, False), 3)]
)
def test_inspect_is_3_where_one_of_several_is_refused(
    accepted: tuple[bool, bool], code: int, calls: Fake, cache: ProjectorCache, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    answers = iter(accepted)
    made = calls("inspect_adapter", lambda *_, **__: report(next(answers)))
    folders = [str(tmp_path / name) for name in "xy"]
    for folder in folders:
        Path(folder).mkdir()
    options = ["--projectors", str(cache.folder), "--device", "meta", "--json"]
    assert main(["inspect", *folders, *options]) == code
    assert [json.loads(line)["accepted"] for line in capsys.readouterr().out.splitlines()] == [*accepted]
    assert [(args[0], args[2], given) for args, given in made] == [
        (folder, Policy(), {"device": "meta"}) for folder in folders
    ]


def test_only_serve_takes_options_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(launch, "serve", lambda *given: started.append(given))
    assert main(["serve", "m", "--projectors", "p", "--port", "8001", "--enforce-eager"]) == 0
    assert (started[0][0], started[0][2]) == ("m", ["--port", "8001", "--enforce-eager"])
    for name, options in {"store ls": [], "audit": [], "calibrate": ["--projectors", "p"]}.items():
        with pytest.raises(SystemExit) as ended:
            main([*name.split(), *options, "--port", "8001"])
        assert ended.value.code == 2
        assert "unrecognized arguments: --port 8001" in capsys.readouterr().err


def parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and those of its commands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [below for one in action.choices.values() for below in parsers(one)]
    return found


def test_no_command_takes_half_an_option() -> None:
    """A vLLM option of `serve` could be half of one of ours, and a script breaks when an option is added."""
    every = parsers(command._parser())
    assert len(every) == 17 and not [parser.prog for parser in every if parser.allow_abbrev]


@pytest.mark.parametrize("missing", [("vllm",), ("fastapi",), ("vllm", "fastapi")], ids=" and ".join)
def test_serve_says_what_to_install(
    missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "_installed", lambda name: name not in missing)
    assert main(["serve", "m", "--projectors", "p"]) == 2
    assert f"serve needs {' and '.join(missing)}: install them with pip" in capsys.readouterr().err


def test_a_module_that_breaks_while_it_is_looked_for_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    errors = iter([ImportError("x"), ValueError("x.__spec__ is None")])

    def failing(_: str) -> None:
        raise next(errors)

    monkeypatch.setattr("importlib.util.find_spec", failing)
    assert not serve._installed("vllm") and not serve._installed("vllm")
    monkeypatch.undo()
    assert serve._installed("argparse") and not serve._installed("no_such_module")


def test_paths_of_serve_mean_the_same_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(launch, "serve", lambda _, given, __: started.append(given))
    monkeypatch.chdir(tmp_path)
    paths = ["--adapter-store", "s", "--keys", "k", "--adapter-root", "r", "--adapter-root", "../q"]
    assert main(["serve", "m", "--projectors", "p", *paths]) == 0
    settings, here = started[0], tmp_path
    assert (settings.projectors, settings.store) == (str(here / "p"), str(here / "s"))
    assert settings.keys == str(here / "k")
    assert settings.adapter_roots == [str(here / "r"), str(here.parent / "q")]


@pytest.mark.parametrize(
    ("arguments", "handler"), [(["store", "ls"], signal.SIG_DFL), (["serve", "m"], signal.SIG_IGN)]
)
def test_the_console_script_ends_quietly_in_a_pipe_but_a_server_lives_on(
    arguments: list[str], handler: signal.Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["safelora-vllm", *arguments])
    monkeypatch.setattr(command, "main", lambda: 7)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: given.append(options["level"]))
    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as ended:
            entry()
        assert (ended.value.code, signal.getsignal(signal.SIGPIPE)) == (7, handler)
    finally:
        signal.signal(signal.SIGPIPE, before)
    assert given == [logging.WARNING]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("1", 1), ("7B", 7), ("2KB", 2000), ("2KiB", 2048), ("3mb", 3 * 10**6), ("3MiB", 3 * 2**20),
     ("1.5GB", 15 * 10**8), ("1.5GiB", 3 * 2**29), ("2TB", 2 * 10**12), ("2TiB", 2 * 2**40),
     (" 5 kb ", 5000)],
)  # fmt: skip
def test_units_of_sizes(text: str, nbytes: int) -> None:
    assert size(text) == nbytes
    assert size(size_text(nbytes)) == nbytes


@pytest.mark.parametrize("text", ["IB", "5IB", "-1", "1e3", "x", "", "5 G", "1.GB", "٣"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a valid size: expected bytes"):
        size(text)


@pytest.mark.usefixtures("unopened")
def test_report_only_of_a_refused_adapter_says_what_enforcing_would_do(
    calls: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = Policy.from_mapping({"mode": "report-only"})
    calls("project_adapter", lambda *_, **__: report(policy=policy))
    options = ["--projectors", "p", "--out", "o", "--mode", "report-only"]
    assert main(["project", "a", *options]) == 0
    assert capsys.readouterr().out == (
        "report-only mode: written UNPROJECTED to o; enforcing would project 1 of 1 modules\n"
    )
