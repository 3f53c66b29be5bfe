"""What the safety benchmark does with an aligned model that fails the check: training is stood in for."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks" / "safety"))

import check
import parts
import run
import training
from training import ALIGNED, PROJECTORS, Job

Fails = Callable[[int, str], bool]  # draw, half


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that data were drawn with: each aligned model's weights are its seed."""
    seeds: list[int] = []

    def make_aligned(_cache: Path, _pair: str, seed: int, target: Path, _checkpoint: Path) -> None:
        seeds.append(seed)
        (target / "model.safetensors").write_text(str(seed))

    def train_all(jobs: list[Job]) -> None:
        for job in jobs:
            training.share(job)
            if not job.done:
                training.train(job)

    monkeypatch.setattr(training, "make_aligned", make_aligned)
    monkeypatch.setattr(training, "build", lambda _base, _aligned, out, _options: out.mkdir())
    monkeypatch.setattr(training, "base_of", lambda cache, family: cache / family / "base")
    monkeypatch.setattr(run, "train_all", train_all)
    return seeds


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fails], None]:
    """Set which draw's models fail on which half."""

    def by(fails: Fails) -> None:
        def checked(home: Path, _pair: str, halves: list[str]) -> None:
            aligned = (home / ALIGNED).resolve()
            seed = int((aligned / "model.safetensors").read_text())
            for half in halves:
                figures = {"figures": {"asr": seed / 1000}}
                aligned.with_name(f"check-{half}.json").write_text(json.dumps(figures))
                if fails(seed // 100, half):
                    raise check.UnusablePair(half)

        monkeypatch.setattr(check, "checked", checked)

    return by


def checked(cache: Path, pair: str, seed: int = 2) -> Job:
    job = Job(cache, pair, seed, ALIGNED)
    run.train_all([job])
    run._check(job)
    return job


def test_data_are_drawn_anew_until_a_model_passes(
    tmp_path: Path, trained: list[int], failing: Callable[[Fails], None]
) -> None:
    failing(lambda draw, half: draw < 2 and half == "choose")
    home = tmp_path / "smollm2" / "2"
    for made in ("mixed-10-qv", "scores/none", "thin-projectors"):
        (home / made).mkdir(parents=True)
    job = checked(tmp_path, "smollm2")
    assert trained == [2, 102, 202]
    folders = {path.name for path in home.iterdir() if path.is_dir()}
    assert folders == {ALIGNED, PROJECTORS}, "nothing is left that was made of another model"
    assert (job.aligned / "model.safetensors").read_text() == "202" and (job.home / PROJECTORS).is_dir()
    assert parts._measured(tmp_path, "smollm2", job.home).checks == {
        "choose, rejected draw 1": {"asr": 0.002},
        "choose, rejected draw 2": {"asr": 0.102},
        "choose": {"asr": 0.202},
        "report": {"asr": 0.202},
    }
    run._check(job)
    assert trained == [2, 102, 202]


def test_a_model_of_all_seeds_is_the_same_whichever_seed_asks_for_it(
    tmp_path: Path, trained: list[int], failing: Callable[[Fails], None]
) -> None:
    failing(lambda draw, half: draw < 1 and half == "choose")
    adapters = [tmp_path / "gemma3" / seed / "mixed-10-qv" for seed in ("0", "2")]
    for folder in (*adapters, base := tmp_path / "gemma3" / "base"):
        folder.mkdir(parents=True)
    checked(tmp_path, "gemma3", 2)
    checked(tmp_path, "gemma3", 1)
    assert trained == [0, 100]
    assert base.exists() and not any(folder.exists() for folder in adapters)


@pytest.mark.parametrize("stop", range(1, 5))
def test_a_run_that_is_stopped_while_it_rejects_loses_no_draw(
    stop: int,
    tmp_path: Path,
    trained: list[int],
    failing: Callable[[Fails], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At each step of it: the same model is made again, or found again, and rejected once."""
    failing(lambda draw, half: draw < 1 and half == "choose")
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
        with pytest.raises(Killed):
            run._check(job)
    checked(tmp_path, "smollm2")
    assert trained in ([2, 102], [2, 2, 102])
    assert [json.loads(file.read_text())["figures"]["asr"] for file in job.rejected] == [0.002]
    assert not (job.home / "mixed-10-qv").exists()


def test_it_stops_after_some_draws(
    tmp_path: Path, trained: list[int], failing: Callable[[Fails], None]
) -> None:
    failing(lambda _draw, _half: True)
    with pytest.raises(check.UnusablePair, match="choose"):
        checked(tmp_path, "smollm2")
    assert trained == [2 + 100 * draw for draw in range(training.DRAWS)]


def test_nothing_is_drawn_for_the_half_that_is_published(
    tmp_path: Path, trained: list[int], failing: Callable[[Fails], None]
) -> None:
    failing(lambda _draw, half: half == "report")
    with pytest.raises(check.UnusablePair, match="report"):
        checked(tmp_path, "smollm2")
    assert trained == [2]


def test_an_alignment_that_is_not_trained_is_not_drawn(
    tmp_path: Path, trained: list[int], failing: Callable[[Fails], None]
) -> None:
    failing(lambda _draw, half: half == "choose")
    with pytest.raises(check.UnusablePair):
        checked(tmp_path, "smollm2-lora")
    assert trained == [0]
