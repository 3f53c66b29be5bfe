"""Judging and projecting one adapter: milliseconds, kernels, waits, the memory that it takes for a while."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu.common import MIB, Weights, launches, random_weights, say, synchronize, timed_ms
from random_projectors import LLAMA_2_7B, LLAMA_3_8B, LLAMA_3_70B, Shapes, write_cache

from safelora_vllm.methods import judge
from safelora_vllm.methods.reads import parts_read
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache

CPU = torch.device("cpu")
TINY: Shapes = {"self_attn.q_proj": (256, 256), "mlp.gate_proj": (704, 256), "mlp.down_proj": (256, 704)}
# Ĉ or V of all 32 layers would be drawn for minutes: those of eight are far more than the card's cache.
POLICIES = {
    "input-removal": (Policy(), 32),
    "csulora": (Policy(method="csulora", energy=0.2), 32),
    "safe-lora, threshold": (Policy(method="safe-lora"), 8),
    "input-removal, threshold": (Policy(select="threshold"), 8),
}
RANKS = (8, 16, 64, 256, 512)


def measure(device: torch.device, scratch: Path, quick: bool) -> dict[str, Any]:
    """Figures of each policy; of the default also at other sizes and ranks, on the CPU, module by module."""
    shapes, layers = (TINY, {32: 2, 8: 1}) if quick else (LLAMA_2_7B, {32: 32, 8: 8})
    caches = {}
    for count, operators in ((32, False), (8, True)):
        caches[count] = scratch / f"layers-{count}"
        write_cache(caches[count], shapes, layers[count], operators, str(device))
    found: dict[str, Any] = {}
    for name, (policy, count) in POLICIES.items():
        cache = loaded(caches[count], policy, device)
        weights = [random_weights(cache, 16, device, seed) for seed in range(3)]
        row = adapter_figures(cache, weights, policy, device, 5)
        if device.type == "cuda":
            row["held_mib"] = round(cache.resident_bytes()["device"] / MIB, 1)
        found[f"{name}, {layers[count]} layers, r 16"] = row
        say({name: row})
        if name == "input-removal":
            kept, judge._DEVICE_BYTES = judge._DEVICE_BYTES, 0
            one_by_one = adapter_figures(cache, weights, policy, device)
            judge._DEVICE_BYTES = kept
            found["the same, one module at a time"] = one_by_one
            say({"one module at a time": one_by_one})
            found["the same, on one thread of the CPU"] = on_cpu = one_thread(
                caches[count], policy, weights[0]
            )
            say({"one thread of the CPU": on_cpu})
            found["ranks"] = {}
            for rank in RANKS[:2] if quick else RANKS:
                repeats = 9 if rank < 256 else 3
                row = adapter_figures(cache, [random_weights(cache, rank, device)], policy, device, repeats)
                found["ranks"][rank] = row
                say({f"rank {rank}": row})
            if device.type == "cuda":
                found["group sizes"] = sizes(cache, weights, policy, device)
        del cache, weights
        gc.collect()
    for title, big, count in (("Llama-3-8B", LLAMA_3_8B, 32), ("Llama-3-70B", LLAMA_3_70B, 80)):
        if quick:
            continue
        folder = scratch / title
        write_cache(folder, big, count, operators=False, device=str(device))
        cache = loaded(folder, Policy(), device)
        row = adapter_figures(cache, [random_weights(cache, 16, device)], Policy(), device, 5)
        row["held_mib"] = round(cache.resident_bytes()["device"] / MIB, 1)
        found[f"{title}, input-removal, r 16"] = row
        say({title: row})
    return found


def one_thread(folder: Path, policy: Policy, weights: Weights) -> dict[str, float]:
    """Milliseconds of the same on one thread of the CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cache = loaded(folder, policy, CPU)
    ms = median(timed_ms(CPU, lambda: run(cache, weights, policy, CPU), 3, 1))
    torch.set_num_threads(threads)
    return {"ms": round(ms, 1)}


def sizes(
    cache: ProjectorCache, weights: list[Weights], policy: Policy, device: torch.device
) -> dict[str, Any]:
    """Milliseconds and memory by the bytes of A and B that a group may have."""
    kept, found = judge._DEVICE_BYTES, {}
    for megabytes in (4, 8, 16, 32, 64):
        judge._DEVICE_BYTES = megabytes * MIB
        found[f"{megabytes} MiB"] = adapter_figures(cache, weights, policy, device)
        say({f"groups of {megabytes} MiB": found[f"{megabytes} MiB"]})
    judge._DEVICE_BYTES = kept
    return found


def loaded(folder: Path, policy: Policy, device: torch.device) -> ProjectorCache:
    """A cache with what the policy reads on the device."""
    cache = ProjectorCache(folder)
    cache.load(device, None, **dataclasses.asdict(parts_read(policy, cache.thin)))
    return cache


def run(cache: ProjectorCache, weights: Weights, policy: Policy, device: torch.device) -> None:
    """One adapter, as the gate does it."""
    with torch.inference_mode():
        judge.judge(weights, cache, policy, device, torch.bfloat16)


def adapter_figures(
    cache: ProjectorCache, weights: list[Weights], policy: Policy, device: torch.device, repeats: int = 9
) -> dict[str, Any]:
    """Of one adapter after another."""
    turns = iter(range(10**6))

    def work() -> None:
        run(cache, weights[next(turns) % len(weights)], policy, device)

    row: dict[str, Any] = {"ms": round(median(timed_ms(device, work, repeats)), 2), **launches(device, work)}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        synchronize(device)
        row["transient_mib"] = round((torch.cuda.max_memory_allocated(device) - before) / MIB, 1)
        row["cached_mib"] = round((torch.cuda.memory_reserved(device) - before) / MIB, 1)
    return row
