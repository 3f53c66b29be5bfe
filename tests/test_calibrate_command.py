"""``safelora-vllm calibrate``: its tables, its JSON, its errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safelora_vllm.cli import USAGE
from safelora_vllm.cli.main import main
from safelora_vllm.methods.calibration import calibrate
from safelora_vllm.methods.input_removal import InputRemovalEffect, energy_that_keeps
from safelora_vllm.methods.safe_lora import SafeLoraEffect
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import Projector, ProjectorCache
from tests.tiny import module_shapes

Run = Callable[..., tuple[int, str, str]]
KINDS = list(dict.fromkeys(name.rpartition(".")[2] for name in module_shapes()))


@pytest.fixture
def run(cache: ProjectorCache, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command at 80 columns: exit code, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*options: str, projectors: Path = cache.folder) -> Any:
        try:
            code = main(["calibrate", "--projectors", str(projectors), *options])
        except SystemExit as error:  # argparse ends the process itself
            assert isinstance(error.code, int)
            code = error.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def projectors(cache: ProjectorCache) -> list[Projector]:
    """One per module."""
    return [cache.projector(name) for name in cache.modules]


def rows(text: str) -> dict[str, list[str]]:
    """First cell → the other cells of every line of every table."""
    lines = [re.split(r"\s*│\s*", line.strip("│ ")) for line in text.splitlines() if line.startswith("│")]
    return {cells[0]: cells[1:] for cells in lines}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--method", "safe-lora"),
        ("--keep-random", "0.9"),
        ("--method", "safe-lora", "--select", "all"),
    ],
    ids=str,
)
def test_the_tables_fit_80_columns_and_lose_nothing(options: tuple[str, ...], run: Run) -> None:
    code, out, error = run(*options)
    assert (code, error) == (0, "")
    assert max(map(len, out.splitlines())) <= 80 and "…" not in out
    assert set(rows(out)) > {*KINDS, "all", "0.2", "0.8"}


def test_safe_lora_in_figures(run: Run, projectors: list[Projector]) -> None:
    _, out, _ = run("--method", "safe-lora", "--threshold", "0.6")
    assert "safe-lora, select threshold 0.6" in out
    calibration = calibrate(projectors, Policy(method="safe-lora", threshold=0.6))
    assert 0 < calibration.whole.projected < 14
    table = rows(out)
    for kind, effect in [*calibration.types.items(), ("all", calibration.whole)]:
        assert isinstance(effect, SafeLoraEffect)
        null = effect.null_similarity
        assert table[kind][0] == f"{effect.projected}/{effect.modules}"
        assert table[kind][1] == f"{null.min:.4f}–{null.median:.4f}–{null.max:.4f}"
        assert table[kind][3] == f"{effect.effect_kept:.4f}"
    assert len(table["0.6"]) == 2 and table["0.6"][0] == table["all"][0]  # c₀ is not in the ladder


def test_input_removal_in_figures(run: Run, projectors: list[Projector]) -> None:
    _, out, _ = run("--method", "input-removal", "--energy", "0.5")
    assert "input-removal, energy 0.5, select all" in out
    table, calibration = rows(out), calibrate(projectors, Policy(method="input-removal", energy=0.5))
    for kind, effect in [*calibration.types.items(), ("all", calibration.whole)]:
        assert isinstance(effect, InputRemovalEffect)
        taken = effect.taken
        assert table[kind][1] == f"{taken.min:.4f}–{taken.median:.4f}–{taken.max:.4f}"
        assert table[kind][3:] == [f"{effect.effect_kept:.4f}", f"{1 - taken.max:.4f}"]
    assert table["0.5"] == table["all"] and "0.95" in table


def test_keep_random_prints_options_that_work(run: Run, projectors: list[Projector]) -> None:
    energy = energy_that_keeps(0.9, projectors)
    assert 0.01 < energy < 0.95
    code, out, _ = run("--keep-random", "0.9")
    assert code == 0 and f"\n  --method input-removal --energy {energy:g}\n" in out
    assert f"input-removal, energy {energy:g}, select all" in out and "--max-energy" not in out
    (given,) = (line.split() for line in out.splitlines() if line.startswith("  --"))
    _, again, _ = run(*given)
    assert rows(again) == rows(out)


def test_keep_random_says_when_the_cache_is_the_limit(run: Run) -> None:
    _, out, _ = run("--keep-random", "0")
    assert "--energy 0.95\nThe cache keeps no larger energy; for more" in out


def test_keep_random_repeats_how_modules_are_selected(run: Run) -> None:
    _, out, _ = run("--keep-random", "0.9", "--select", "threshold", "--threshold", "0.5")
    assert "--method input-removal --select threshold --threshold 0.5 --energy" in out


def test_json_has_the_keys_that_others_script_against(run: Run, cache: ProjectorCache) -> None:
    code, out, _ = run("--json", "--keep-random", "0.9")
    found = json.loads(out)
    assert code == 0
    assert list(found) == ["projectors", "policy", "keep_random", "types", "all", "ladder"]
    assert found["projectors"] == cache.id and found["policy"]["method"] == "input-removal"
    energy = found["policy"]["energy"]
    assert found["keep_random"] == {
        "share": 0.9,
        "options": f"--method input-removal --energy {energy}",
        "limited_by_cache": False,
    }
    assert {line["type"] for line in found["types"]} == set(KINDS) and len(found["types"]) == 7
    figures = ["modules", "projected", "effect_kept", "least_kept", "taken", "energy"]
    assert list(found["all"]) == figures and list(found["all"]["taken"]) == ["min", "median", "max"]
    assert found["all"]["least_kept"] >= 0.9
    assert all(list(line) == ["type", *figures] for line in found["types"])
    assert all(list(line) == ["strength", "value", *figures] for line in found["ladder"])
    assert {line["strength"] for line in found["ladder"]} == {"energy"}
    found = json.loads(run("--json", "--method", "safe-lora")[1])
    assert found["keep_random"] is None and found["ladder"][0]["strength"] == "threshold"
    figures = ["modules", "projected", "effect_kept", "null_similarity", "norm_kept"]
    assert list(found["all"]) == figures


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ("--keep-random", "0.9", "--energy", "0.5"),
            "--keep-random finds the energy: leave --energy or --keep-random out",
        ),
        (("--keep-random", "0.9", "--method", "safe-lora"), "--keep-random has no effect with --method"),
        (("--keep-random", "0.9", "--threshold", "0.5"), "--threshold has no effect with --select 'all'"),
        (("--keep-random", "1.5"), "--keep-random is 1.5: expected a share from 0 to 1"),
        (("--keep-random", "1"), "no energy keeps 1 of a random adapter's effect"),
        (("--keep-random", "much"), "invalid float value"),
        (("--method", "safe-lora", "--energy", "0.5"), "--energy has no effect with --method 'safe-lora'"),
        (("--method", "input-removal", "--energy", "0.99"), "Build it again with a --max-energy of 0.99"),
        (("--method", "safe-lora", "--number", "3"), "--number has no effect with --select 'threshold'"),
        (("--threshold", "2"), "--threshold is 2.0: expected a number from -1 to 1"),
        (("--mode", "report-only"), "unrecognized arguments: --mode report-only"),
        (("--max-relative-norm", "2"), "unrecognized arguments: --max-relative-norm 2"),
    ],
    ids=str,
)
@pytest.mark.parametrize("json_option", [(), ("--json",)], ids=["table", "json"])
def test_wrong_usage_is_2_with_a_sentence(
    options: tuple[str, ...], sentence: str, json_option: tuple[str, ...], run: Run
) -> None:
    code, out, error = run(*options, *json_option)
    assert code == 2 and out == "" and sentence in error and "Traceback" not in error


def test_a_cache_that_is_not_there_or_damaged_is_2(run: Run, cache: ProjectorCache, tmp_path: Path) -> None:
    code, _, error = run(projectors=tmp_path / "none")
    assert code == 2 and "no projector cache in" in error
    damaged = Path(shutil.copytree(cache.folder, tmp_path / "damaged"))
    for shard in damaged.glob("*.safetensors"):
        shard.unlink()
    assert run("--method", "safe-lora", projectors=damaged)[0] == 0  # needs the manifest only
    code, out, error = run("--method", "input-removal", projectors=damaged)
    assert (code, out) == (2, "") and "Restore it or build the cache again" in error


def test_a_cache_without_modules_is_2(run: Run, cache: ProjectorCache, tmp_path: Path) -> None:
    empty = Path(shutil.copytree(cache.folder, tmp_path / "empty"))
    manifest = json.loads((empty / "manifest.json").read_text())
    (empty / "manifest.json").write_text(json.dumps({**manifest, "modules": []}))
    code, _, error = run(projectors=empty)
    assert code == 2 and "has no modules; build it again" in error


def test_a_long_type_of_module_is_folded_and_figures_stay_whole(
    run: Run, cache: ProjectorCache, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(cache.folder, tmp_path / "long"))
    text = (folder / "manifest.json").read_text().replace("q_proj", "attention_query_projection\\u001b")
    (folder / "manifest.json").write_text(text)
    code, out, _ = run("--method", "safe-lora", projectors=folder)
    assert code == 0 and "…" not in out and "\x1b" not in out
    assert all(len(line) <= 80 for line in out.splitlines())
    folded = next(cells for label, cells in rows(out).items() if label.startswith("'atten"))
    assert re.fullmatch(r"\d/2", folded[0]) and re.fullmatch(r"0\.\d{4}(–0\.\d{4}){2}", folded[1])


def test_help_names_the_options_that_it_takes(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and "--mode" not in out
    for option in ("--keep-random", "--method", "--select", "--threshold", "--number", "--energy", "--json"):
        assert option in out


def test_a_policy_that_projects_nothing_has_nothing_to_calibrate(run: Run) -> None:
    code, out, err = run("--select", "none")
    assert (code, out) == (USAGE, "")
    assert (
        "with --select 'none' nothing is projected, so there is nothing to calibrate: leave --select" in err
    )
