"""One way to judge and project an adapter, in a process of its own; projection.py starts it.

It loads its projectors, says how much memory they take, then answers each line on stdin (the number of an
adapter) with the seconds that the adapter took, its similarities, and the memory that the work needed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from synthetic import load_adapter
from torch import Tensor

from safelora_vllm.methods.judge import judge
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache

Weights = dict[str, tuple[Tensor, Tensor]]
RELEASED = "released"
_POLICY = Policy(method="safe-lora")


def released(projectors: dict[str, Tensor], weights: Weights) -> dict[str, float | None]:
    """The released algorithm, restated: dense float32 Ĉ, both deltas dense, a float32 cosine over them."""
    similarities: dict[str, float | None] = {}
    for name, (a, b) in weights.items():
        projected = projectors[name] @ b
        new, old = projected @ a, b @ a
        cosine = torch.nn.functional.cosine_similarity(new.view(1, -1), old.view(1, -1)).item()
        similarities[name] = cosine
        if cosine <= _POLICY.threshold:
            weights[name] = a, projected
    return similarities


def ours(cache: ProjectorCache, weights: Weights) -> dict[str, float | None]:
    """The gate's own steps between vetting and publishing, with all the figures of its report."""
    similarities: dict[str, float | None] = {}
    for module in judge(weights, cache, _POLICY, torch.device("cpu"), torch.float32):
        weights[module.entry.name] = module.a, module.b
        similarities[module.entry.name] = module.similarity.middle if module.similarity else None
    return similarities


def main(kind: str, folder: Path, threads: int) -> None:
    """Serve measurements of one contender until stdin ends."""
    torch.set_num_threads(threads)
    start = _memory("VmRSS")
    run, nbytes = _prepare(kind, folder)
    _answer({"projector_bytes": nbytes, "resident_bytes": _memory("VmRSS") - start})
    for line in sys.stdin:
        weights = load_adapter(folder, int(line))
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _memory("VmRSS")
        started = time.perf_counter()
        with torch.inference_mode():
            similarities = run(weights)
        seconds = time.perf_counter() - started
        working = _memory("VmHWM") - before
        _answer({"seconds": seconds, "working_bytes": working, "similarities": similarities})


def _prepare(kind: str, folder: Path) -> tuple[Callable[[Weights], dict[str, float | None]], int]:
    """The function to measure, with its projectors in memory, and their bytes."""
    cache = ProjectorCache(folder / ("dense-float32" if kind == RELEASED else kind))
    cache.load("cpu")
    held = {}
    for name, entry in cache.modules.items():
        part = "projector" if entry.form == "dense" else "delta"
        held[name] = cache.tensor(f"{name}.{part}", entry.shard, torch.device("cpu"))
        held[name].sum()  # every page is in memory before the first measurement
    nbytes = sum(tensor.nbytes for tensor in held.values())
    if kind == RELEASED:
        dense = {name: tensor.clone() for name, tensor in held.items()}
        return lambda weights: released(dense, weights), nbytes
    return lambda weights: ours(cache, weights), nbytes


def _memory(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS is now, VmHWM the peak since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def _answer(value: dict[str, object]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
