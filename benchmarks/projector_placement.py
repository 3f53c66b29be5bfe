"""Projecting where Ĉ and V are not in the gate's memory: all held, read at each use, read one module ahead.

    python benchmarks/projector_placement.py --projectors DIR [--repeats N]

Adapters are judged by Safe LoRA with the given cache, and with one layer of Llama-2-7B's shapes that is drawn
here. All three take turns on the same adapters. The shards are in the page cache: no disk is measured.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import recording
import torch
from random_adapters import KINDS, write_adapters
from random_projectors import LLAMA_2_7B, write_cache

from safelora_vllm.adapters.read import Limits, read_adapter
from safelora_vllm.gate.admit import GateSettings, evaluate
from safelora_vllm.gate.memory import placed
from safelora_vllm.methods.reads import parts_read
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.sizes import groups_of_cache

POLICY, CPU = Policy(method="safe-lora"), torch.device("cpu")
PLACES = ("held", "read at each use", "read ahead")


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--projectors", type=Path, required=True, help="the demo's projector cache")
    parser.add_argument("--repeats", type=int, default=9, help="adapters of each kind")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = {}
    with tempfile.TemporaryDirectory() as scratch:
        layer = Path(scratch) / "7b"
        write_cache(layer, LLAMA_2_7B)
        for title, projectors in (("demo", args.projectors), ("one layer of 7B shapes", layer)):
            found = measure(projectors, Path(scratch) / title, args.repeats)
            for kind, row in found.items():
                cases[f"{title}, {kind}"] = row
                print(f"{title:24} {kind:8}", row)
    command = f"projector_placement.py --repeats {args.repeats}"
    path = recording.write("projector_placement", command, 1, {"cases": cases}, args.out)
    print(f"written to {path}")


def measure(projectors: Path, scratch: Path, repeats: int) -> dict[str, Any]:
    """Kind of adapter → where its projectors are → figures."""
    scratch.mkdir()
    adapters = write_adapters(scratch, projectors, repeats)
    caches = {name: _opened(projectors, name) for name in PLACES}
    figures: dict[str, Any] = {}
    for kind in KINDS:
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in PLACES}
        for index, adapter in enumerate(adapters[kind]):
            turn = [*PLACES[index % len(PLACES) :], *PLACES[: index % len(PLACES)]]
            found = {name: _judged(adapter, caches[name]) for name in turn}
            assert len({report for report, _ in found.values()}) == 1, "the answers differ"
            for name, (_, times) in found.items():
                runs[name] += [times] * (index > 0)  # the first one warms up
        figures[kind] = {
            name: {
                "memory_mib": round(
                    sum(caches[name].resident_bytes()[t] for t in ("device", "host")) / 2**20, 1
                ),
                "cpu_ms": round(median(cpu for cpu, _ in times), 1),
                "ms": round(median(wall for _, wall in times), 1),
            }
            for name, times in runs.items()
        }
    return figures


def _opened(projectors: Path, name: str) -> ProjectorCache:
    cache = ProjectorCache(projectors)
    parts = parts_read(POLICY, cache.thin)
    groups = groups_of_cache(cache, parts)
    least = placed(groups, POLICY, CPU, 16)[0].least
    placement = placed(groups, POLICY, CPU, 16, None if name == "held" else least)[1]
    cache.load(CPU, placement, **asdict(parts))
    if name == "read at each use":  # as before there was a thread that reads ahead
        cache._ahead = None
    return cache


def _judged(adapter: Path, cache: ProjectorCache) -> tuple[str, tuple[float, float]]:
    """The report, and milliseconds of the processor and of the clock."""
    raw, settings = read_adapter(adapter, Limits()), GateSettings(cache, POLICY, dtype=torch.bfloat16)
    cpu, wall = time.process_time(), time.perf_counter()
    report, _ = evaluate(raw, "a", settings)
    return str(report), ((time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3)


if __name__ == "__main__":
    main()
