"""``safelora-vllm exam`` on the demo's models: the useful adapter, the harmful one, and errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from safelora_vllm.adapters.read import CONFIG, WEIGHTS, content_digest
from safelora_vllm.api.exam import Examination
from safelora_vllm.cli import DONE, REFUSED, USAGE
from safelora_vllm.cli.main import main
from safelora_vllm.errors import UsageError
from safelora_vllm.exam.ladder import parse
from safelora_vllm.exam.probes import Halves, Probes, from_file
from safelora_vllm.exam.score import Score
from safelora_vllm.integration.server.exam.references import secret_of
from safelora_vllm.policy import Policy

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
USEFUL, HARMFUL = EXAMPLES / "order-to-json", EXAMPLES / "no-refusals"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(aligned: Path, projectors: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*options: str) -> tuple[int, str, str]:
        places = ["--model", str(aligned), "--projectors", str(projectors), "--count", "32"]
        code = main(["exam", *options, *places])
        return code, *capsys.readouterr()

    return call


def test_each_adapter_gets_the_mildest_rung_that_passes(run: Run) -> None:
    """The harmful one fails where the useful one passes, and what fails says so by its exit code."""
    rungs = ["--ladder", "input-removal:0.05,input-removal:0.8", "--threshold", "0.08", "--json"]
    code, out, _ = run(str(USEFUL), str(HARMFUL), *rungs)
    useful, harmful = map(json.loads, out.splitlines())
    assert code == DONE
    assert useful["served"] == "input-removal:0.05" and len(useful["rungs"]) == 1
    assert harmful["served"] == "input-removal:0.8" and not harmful["rungs"][0]["passed"]
    assert useful["digest"] == content_digest(*((USEFUL / name).read_bytes() for name in (CONFIG, WEIGHTS)))
    assert harmful["rungs"][0]["drop"] > 2 * abs(useful["rungs"][0]["drop"])
    code, out, _ = run(str(HARMFUL), "--ladder", "input-removal:0.05", "--threshold", "0.08")
    assert code == REFUSED and "failed" in out and "refused: [exam]" in out


def test_calibration_names_the_threshold_of_the_mildest_rung(run: Run) -> None:
    code, out, _ = run(str(USEFUL), "--calibrate", "--json", "--ladder", "input-removal:0.05")
    threshold = json.loads(out)["threshold"]
    code, out, _ = run(str(USEFUL), "--ladder", "input-removal:0.05", "--threshold", str(threshold))
    assert code == DONE and "serve it by input-removal:0.05" in out


def test_what_is_examined_is_what_the_gate_publishes(
    aligned: Path, projectors: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is as it was after an exam, and the score is of the copy and not of the upload."""
    examination = Examination.of(aligned, projectors, ladder="safe-lora", count=8)
    known = examination.reference
    raw = Policy(mode="report-only")
    whole, off = (examination.score(HARMFUL, policy) for policy in (raw, parse("safe-lora", Policy())[0]))
    assert whole.drop > 0.05 > off.bound
    again = examination.model.likelihoods(known.prompts, known.answers)
    assert again == pytest.approx(list(known.likelihoods), abs=1e-5)
    seen: list[Any] = []
    monkeypatch.setattr(
        type(examination.model), "adapted", lambda _self, folder: seen.append(folder) or _Open()
    )
    examination.score(HARMFUL, raw)
    assert not seen[0].exists() and seen[0].name == "adapter"  # a scratch folder, gone by now


def test_each_rung_is_asked_of_the_same_bytes(
    aligned: Path, projectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody exchanges the folder after the first rung: the verdict is of what was read first."""
    upload = shutil.copytree(HARMFUL, tmp_path / "upload")
    digest = content_digest(*((upload / name).read_bytes() for name in (CONFIG, WEIGHTS)))
    examination = Examination.of(aligned, projectors, ladder="input-removal:0.05,safe-lora", count=8)
    whole, seen = Examination.score, []

    def exchanging(self: Examination, adapter: Any, policy: Policy) -> Score:
        seen.append((Path(adapter) / WEIGHTS).read_bytes())
        shutil.copyfile(USEFUL / WEIGHTS, upload / WEIGHTS)
        return whole(self, adapter, policy)

    monkeypatch.setattr(Examination, "score", exchanging)
    assert examination.examine(upload, threshold=-1.0).digest == digest
    assert seen == [(HARMFUL / WEIGHTS).read_bytes()] * 2


class _Open:
    def __enter__(self) -> None: ...

    def __exit__(self, *_error: object) -> None: ...


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "there is nothing at 'nowhere'"),
        ([str(USEFUL), "--ladder", "lora"], "'lora' is not a valid rung"),
        ([str(USEFUL), "--ladder", "input-removal:0.99"], "too few directions for input-removal:0.99"),
    ],
)
def test_wrong_usage(run: Run, options: list[str], message: str) -> None:
    code, out, error = run(*options)
    assert code == USAGE and message in error and not out


def test_a_servers_draw_is_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the secret of a store, which is bytes, the command asks what that server's first exams ask."""
    secret = secret_of(tmp_path)
    asked: list[Probes] = []

    def reference(_model: object, probes: Probes) -> None:
        asked.append(probes)
        raise UsageError("enough")

    monkeypatch.setattr("safelora_vllm.api.exam.opened_cache", MagicMock())
    monkeypatch.setattr("safelora_vllm.api.exam.Checkpoint", MagicMock())
    monkeypatch.setattr("safelora_vllm.api.exam.ladders.usable", lambda *_: [])
    monkeypatch.setattr("safelora_vllm.api.exam.Model", MagicMock())
    monkeypatch.setattr("safelora_vllm.api.exam.reference", reference)
    (own := tmp_path / "probes.jsonl").write_text(
        "".join(f'{{"prompt": "probe {number}"}}\n' for number in range(40))
    )
    command = ["exam", str(USEFUL), "--model", "aligned", "--projectors", "projectors"]
    server = ["--secret-file", str(tmp_path / "exam" / "secret")]
    for more in (["--languages", "de"], ["--languages", "en,fr"], ["--probes", str(own)]):
        assert main([*command, *server, *more]) == USAGE
    halves = [Halves.built_in(secret, ("de",)), Halves.built_in(secret, ("en", "fr"))]
    assert asked == [half.first for half in [*halves, Halves.of(secret, from_file(own))]]
    assert main([*command, "--probes", str(own)]) == USAGE and asked[-1] == from_file(own)
    capsys.readouterr()
    (empty := tmp_path / "empty").touch()
    wrong = [
        (["--secret", b"\xff\xfe".decode(errors="surrogateescape")], "--secret is not UTF-8 text"),
        (["--secret-file", str(tmp_path / "none")], "cannot be read (No such file or directory)"),
        (["--secret-file", str(empty)], "is empty"),
    ]
    for options, message in wrong:
        assert main([*command, *options]) == USAGE and message in capsys.readouterr().err


def test_another_model_is_no_measure(
    projectors: Path, aligned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = aligned.parent / "base"
    code = main(["exam", str(USEFUL), "--model", str(base), "--projectors", str(projectors)])
    assert code == USAGE and "fingerprint" in capsys.readouterr().err
