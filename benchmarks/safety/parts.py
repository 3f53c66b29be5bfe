"""What was measured of each pair and seed: ``scores/PAIR-SEED.json.xz``, a file of the repository each.

The figures are made from these. So a seed can be added on another machine, and figures be made anew without
the hours that they took.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import risk
from check import check_of
from kept import Kept, Scores, scores_of, seeds
from pairs import BASE, PAIRS
from subjects import HALVES
from training import ALIGNED, Job

_FOLDER, _SUFFIX = "scores", ".json.xz"
_DECIMALS = 6


@dataclass(frozen=True)
class Part:
    """Of one pair and seed.

    scores: by adapter and treatment. risk: the sign-flip score of each adapter as uploaded. checks: the
    aligned model's figures by half, and on `choose` of those that failed.
    """

    scores: dict[str, dict[str, Scores]]
    risk: dict[str, float]
    checks: dict[str, Any]


def save(cache: Path, pair: str, out: Path) -> list[str]:
    """Write the files of all seeds of a pair that the cache has. Returns these seeds."""
    folder = out / _FOLDER
    for home in (homes := seeds(cache, pair)):
        folder.mkdir(parents=True, exist_ok=True)
        data = json.dumps(_rounded(asdict(_measured(cache, pair, home))), sort_keys=True)
        (folder / f"{pair}-{home.name}{_SUFFIX}").write_bytes(lzma.compress(data.encode()))
    return [home.name for home in homes]


def read(out: Path, pair: str) -> dict[str, Part]:
    """All seeds of a pair that there are files of, in their order."""
    files = {
        file.name.removesuffix(_SUFFIX).rpartition("-")[2]: file
        for file in (out / _FOLDER).glob(f"{pair}-[0-9]{_SUFFIX}")
    }
    return {seed: Part(**json.loads(lzma.decompress(files[seed].read_bytes()))) for seed in sorted(files)}


def kept(parts: Mapping[str, Part]) -> Kept:
    """The scores of all seeds of a pair."""
    found: Kept = {}
    for seed, part in parts.items():
        for adapter, treatments in part.scores.items():
            for treatment, scores in treatments.items():
                found.setdefault(adapter, {}).setdefault(treatment, {})[seed] = scores
    return found


def risks(parts: Mapping[str, Part]) -> dict[str, list[float]]:
    """The sign-flip scores of a pair's adapters, by seed."""
    found: dict[str, list[float]] = {}
    for part in parts.values():
        for adapter, score in part.risk.items():
            found.setdefault(adapter, []).append(score)
    return found


def checks(pair: str, parts: Mapping[str, Part]) -> dict[str, Any]:
    """By seed; once where all seeds have the same aligned model."""
    return {seed if PAIRS[pair].each_seed else "all": part.checks for seed, part in parts.items()}


def _measured(cache: Path, pair: str, home: Path) -> Part:
    base, scores = cache / PAIRS[pair].family / BASE, scores_of(home)
    adapters = [home / name for name in sorted({*scores} - {"none"}) if (home / name).exists()]
    return Part(
        scores,
        {each.name: risk.score(each, base, home / ALIGNED) for each in adapters if base.exists()},
        _checked(Job(cache, pair, int(home.name), ALIGNED)),
    )


def _checked(job: Job) -> dict[str, Any]:
    """The figures of every aligned model that was tried, and how much of its training it has."""
    *rejected, present = job.trials()
    found = {}
    for file, trial in zip(job.rejected, rejected, strict=True):
        half = file.stem.rpartition("-")[2]
        found[f"{half}, draw {trial.draw + 1}, rejected at {trial.strength:g}"] = (file, trial.strength)
    found |= {half: (check_of(job.aligned, half), present.strength) for half in HALVES}
    return {
        name: _known(json.loads(file.read_text())["figures"]) | {"strength": strength}
        for name, (file, strength) in found.items()
        if file.exists()
    }


def _known(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Those that were measured: JSON has no NaN."""
    return {name: value for name, value in figures.items() if value == value}


def _rounded(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {name: _rounded(of) for name, of in data.items()}
    if isinstance(data, list):
        return [_rounded(of) for of in data]
    return round(data, _DECIMALS) if isinstance(data, float) else data
