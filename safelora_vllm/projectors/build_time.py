"""How long a build takes on this machine, estimated from one small module that is built for it."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from safelora_vllm.projectors.assumed_spectrum import DECAY
from safelora_vllm.projectors.build import BuildOptions, build_module
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.work import operations

# Sides of the module. A smaller one measures how long operators take to start: on a GPU all of them, on a CPU
# those of the few columns that a thin cache iterates.
_CPU_SIDE, _CPU_THIN_SIDE, _DEVICE_SIDE = 1024, 2048, 4096
_RUNS = 2  # the first one loads libraries
_HASHED = 16 * 1024**2
_NAME = "model.layers.0.linear"

Shape = tuple[int, int]


def estimated_seconds(shapes: Mapping[Shape, int], hashed: int, options: BuildOptions) -> float:
    """Seconds of a build, without the time of the disk.

    Args:
        shapes: (d_out, d_in) → modules of it.
        hashed: bytes of both checkpoints and of the cache, as if they were hashed on one core.
        options: of the build; its device is used for about a second.
    """
    side = _DEVICE_SIDE
    if torch.device(options.device).type == "cpu":
        side = _CPU_SIDE if options.exact else _CPU_THIN_SIDE
    side = min(side, max(map(min, shapes)))
    pace = _module_seconds(side, options) / operations((side, side))
    computing = pace * sum(count * operations(shape) for shape, count in shapes.items())
    return computing + hashed * _hash_seconds() / _HASHED


def _module_seconds(side: int, options: BuildOptions) -> float:
    """Of building one drawn module of this side, files read included."""
    generator = torch.Generator().manual_seed(0)
    base, change = (torch.randn(side, side, generator=generator) for _ in range(2))
    change *= torch.arange(1, side + 1).pow(-DECAY)
    with tempfile.TemporaryDirectory(prefix="safelora-plan-") as folder:
        models = []
        for name, weight in (("base", base), ("aligned", base + change)):
            place = Path(folder, name)
            place.mkdir()
            (place / "config.json").write_text(json.dumps({}))
            save_file({f"{_NAME}.weight": weight}, place / "model.safetensors")
            models.append(Checkpoint(place))
        before, after = models
        seconds = []
        for _ in range(_RUNS):
            started = time.perf_counter()
            build_module(_NAME, before, after, options)
            seconds.append(time.perf_counter() - started)
    return min(seconds)


def _hash_seconds() -> float:
    data = bytes(_HASHED)
    started = time.perf_counter()
    hashlib.sha256(data).digest()
    return time.perf_counter() - started
