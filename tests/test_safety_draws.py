"""What the safety benchmark does with an aligned model that fails the check: training is stood in for."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks" / "safety"))

import check
import measure
import pairs
import parts
import run
import training
from training import ALIGNED, PROJECTORS, Job
from trials import DRAWS, Trial, trials

Fails = Callable[[int, float, str], str]  # draw, strength, half: "answers", "refuses", both words, or none


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that data were drawn with: each aligned model's weights are its seed and its strength."""
    seeds: list[int] = []

    def make_aligned(_cache: Path, _pair: str, seed: int, target: Path, _checkpoint: Path) -> None:
        seeds.append(seed)
        (target / "model.safetensors").write_text(str(seed))

    def at_strength(_base: Path, trained: Path, strength: float, target: Path) -> None:
        seed = (trained / "model.safetensors").read_text()
        (target / "model.safetensors").write_text(f"{seed} {strength}")

    def train_all(jobs: list[Job]) -> None:
        for job in jobs:
            training.share(job)
            if not job.done:
                training.train(job)

    monkeypatch.setattr(training, "make_aligned", make_aligned)
    monkeypatch.setattr(training, "at_strength", at_strength)
    monkeypatch.setattr(training, "build", lambda _base, _aligned, out, _options: out.mkdir())
    monkeypatch.setattr(training, "base_of", lambda cache, family: cache / family / "base")
    monkeypatch.setattr(run, "train_all", train_all)
    return seeds


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fails], None]:
    """Set which draw's models fail at which strength on which half."""

    def by(fails: Fails) -> None:
        def checked(home: Path, _pair: str, halves: list[str]) -> None:
            aligned = (home / ALIGNED).resolve()
            seed, strength = map(float, (aligned / "model.safetensors").read_text().split())
            for half in halves:
                faults = fails(seed // 100, strength, half)
                figures = figures_of(seed, 0.2 * ("answers" in faults), 0.1 * ("refuses" in faults))
                check.check_of(aligned, half).write_text(json.dumps({"figures": asdict(figures)}))
                if faults:
                    raise check.UnusablePair(half, faults, figures)

        monkeypatch.setattr(check, "checked", checked)

    return by


def figures_of(seed: float, asr: float, refuses: float) -> check.Figures:
    return check.Figures(asr, 0.0, 0.0, 0.0, refuses, 0.0, 0.0, 0.0, seed, 0.0, {})


def checked(cache: Path, pair: str, seed: int = 2) -> Job:
    job = Job(cache, pair, seed, ALIGNED)
    run.train_all([job])
    run._check(job)
    return job


@pytest.mark.usefixtures("trained")
def test_a_model_is_rejected_in_a_cache_that_is_reached_through_a_link(
    tmp_path: Path, failing: Callable[[Fails], None]
) -> None:
    failing(lambda _draw, strength, _half: "refuses" * (strength == 1.0))
    (tmp_path / "disk").mkdir()
    (link := tmp_path / "cache").symlink_to("disk")
    job = checked(link, "smollm2")
    assert (job.aligned / "model.safetensors").read_text() == "2 0.9" and len(job.rejected) == 1


def test_strengths_are_tried_before_data_are_drawn_anew(
    tmp_path: Path, trained: list[int], failing: Callable[[Fails], None]
) -> None:
    failing(lambda draw, strength, half: "refuses" * (draw < 1 or (strength == 1.0 and half == "report")))
    home = tmp_path / "smollm2" / "2"
    for made in ("mixed-10-qv", "scores/none", "thin-projectors"):
        (home / made).mkdir(parents=True)
    (home / "inputs.safetensors").touch()
    job = checked(tmp_path, "smollm2")
    assert trained == [2, 102] and not (home / "inputs.safetensors").exists()
    folders = {path.name for path in home.iterdir() if path.is_dir()}
    assert folders == {ALIGNED, PROJECTORS, "trained-1"}, "nothing is left that was made of another model"
    assert (job.aligned / "model.safetensors").read_text() == "102 0.9" and (job.home / PROJECTORS).is_dir()
    found = parts._measured(tmp_path, "smollm2", job.home).checks
    assert {name: (of["exact"], of["refuses_harmless"], of["strength"]) for name, of in found.items()} == {
        "choose, draw 1, rejected at 1": (2, 0.1, 1.0),
        "choose, draw 1, rejected at 0.9": (2, 0.1, 0.9),
        "choose, draw 1, rejected at 0.8": (2, 0.1, 0.8),
        "report, draw 2, rejected at 1": (102, 0.1, 1.0),
        "choose": (102, 0.0, 0.9),
        "report": (102, 0.0, 0.9),
    }
    run._check(job)
    assert trained == [2, 102]


def test_a_model_of_all_seeds_is_the_same_whichever_seed_asks_for_it(
    tmp_path: Path, trained: list[int], failing: Callable[[Fails], None]
) -> None:
    failing(lambda draw, strength, _half: "refuses" * (draw < 1 or strength == 1.0))
    adapters = [tmp_path / "gemma3" / seed / "mixed-10-qv" for seed in ("0", "2")]
    for folder in (*adapters, base := tmp_path / "gemma3" / "base"):
        folder.mkdir(parents=True)
    checked(tmp_path, "gemma3", 2)
    checked(tmp_path, "gemma3", 1)
    assert trained == [0, 100]
    assert base.exists() and not any(folder.exists() for folder in adapters)


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_run_that_is_stopped_while_it_rejects_loses_no_draw(
    stop: int,
    tmp_path: Path,
    trained: list[int],
    failing: Callable[[Fails], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At each step of it: the same model is made again, or found again, and rejected once."""
    failing(lambda _draw, strength, half: "refuses" * (strength == 1.0 and half == "report"))
    (tmp_path / "smollm2" / "2" / "mixed-10-qv").mkdir(parents=True)
    steps = iter(range(1, 100))

    class Killed(BaseException):
        pass

    def counted(act: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **more: Any) -> Any:
            if next(steps) == stop:
                raise Killed
            return act(*args, **more)

        return step

    job = Job(tmp_path, "smollm2", 2, ALIGNED)
    run.train_all([job])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        with pytest.raises(Killed):
            run._check(job)
    checked(tmp_path, "smollm2")
    assert trained == [2]
    assert [file.name for file in job.rejected] == ["rejected-00-report.json"]
    assert job.trials() == [Trial(0, 1.0), Trial(0, 0.9)]
    assert not (job.home / "mixed-10-qv").exists()


def test_it_stops_after_some_draws(
    tmp_path: Path, trained: list[int], failing: Callable[[Fails], None]
) -> None:
    failing(lambda _draw, _strength, _half: "refuses")
    with pytest.raises(check.UnusablePair, match="choose"):
        checked(tmp_path, "smollm2")
    assert trained == [2 + 100 * draw for draw in range(DRAWS)]
    names = [file.name for file in Job(tmp_path, "smollm2", 2, ALIGNED).rejected]
    assert names == [f"rejected-{number:02}-choose.json" for number in range(11)]


def test_an_alignment_that_is_not_trained_is_tried_once(
    tmp_path: Path, trained: list[int], failing: Callable[[Fails], None]
) -> None:
    failing(lambda _draw, _strength, half: "answers" * (half == "choose"))
    with pytest.raises(check.UnusablePair):
        checked(tmp_path, "smollm2-lora")
    assert trained == [0] and not Job(tmp_path, "smollm2-lora", 2, ALIGNED).rejected


@pytest.mark.parametrize(
    ("faults", "tried"),
    [
        ("", [(0, 1.0)]),
        ("RR", [(0, 1.0), (0, 0.9), (0, 0.8)]),
        ("RRR", [(0, 1.0), (0, 0.9), (0, 0.8), (1, 1.0)]),
        ("AAA", [(0, 1.0), (0, 1.15), (0, 1.3), (1, 1.0)]),
        ("RA", [(0, 1.0), (0, 0.9), (1, 1.0)]),
        ("AR", [(0, 1.0), (0, 1.15), (1, 1.0)]),
        ("BR", [(0, 1.0), (1, 1.0), (1, 0.9)]),
    ],
)
def test_only_strengths_that_can_mend_a_fault_are_tried(faults: str, tried: list[tuple[int, float]]) -> None:
    """R: refuses too much. A: answers too much. B: both."""
    failed = [figures_of(0, 0.151 * (fault in "AB"), 0.051 * (fault in "RB")) for fault in faults]
    assert [(trial.draw, trial.strength) for trial in trials(failed)] == tried


def test_refused_tasks_are_mended_by_a_weaker_model() -> None:
    refuses_tasks = replace(figures_of(0, 0.15, 0.05), refuses_tasks=0.051)
    assert list(trials([refuses_tasks])) == [Trial(0, 1.0), Trial(0, 0.9)]


def test_seeds_of_one_aligned_model_share_a_server() -> None:
    together = run._by_model(run.parts_of(["smollm2", "gemma3"], [0, 1], None))
    assert [[(part.pair, part.seed) for part in parts] for parts in together] == [
        [("smollm2", 0)],
        [("gemma3", 0), ("gemma3", 1)],
        [("smollm2", 1)],
    ]


def test_what_is_asked_of_another_seed_is_kept_with_that_seed(tmp_path: Path) -> None:
    seed = object.__new__(measure.Seed)
    seed._scores_in = tmp_path / "0" / "thin-scores"
    assert seed.beside(tmp_path / "2")._kept("a", "raw", "", lambda: {"loyal": [1.0]}) == {"loyal": [1.0]}
    assert [file.name for file in tmp_path.rglob("*.json")] == ["raw.json"]
    assert (tmp_path / "2" / "thin-scores" / "a" / "raw.json").exists()


def test_a_strength_is_a_share_of_what_training_changed(tmp_path: Path) -> None:
    for name, weight in (("base", 1.0), ("trained", 3.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        save_file({"w": torch.tensor([weight, 1.0]).bfloat16()}, tmp_path / name / "model.safetensors")
    for strength, weight in ((0.5, 2.0), (1.0, 3.0), (1.5, 4.0)):
        (target := tmp_path / str(strength)).mkdir()
        pairs.at_strength(tmp_path / "base", tmp_path / "trained", strength, target)
        made = load_file(target / "model.safetensors")["w"]
        assert made.tolist() == [weight, 1.0] and made.dtype == torch.bfloat16
        assert (target / "config.json").read_text() == "trained"
