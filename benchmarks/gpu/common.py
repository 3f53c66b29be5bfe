"""What the sections of the GPU check share: clocks, memory, profiles; on a CPU too, to try the code."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from safelora_vllm.methods import lowrank
from safelora_vllm.projectors.cache import ProjectorCache

MIB = 2**20
Weights = dict[str, tuple[Tensor, Tensor]]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_ms(device: torch.device, work: Callable[[], Any], repeats: int, warm_up: int = 2) -> list[float]:
    """Milliseconds of each repeat, all work of the device included."""
    for _ in range(warm_up):
        work()
    found = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        found.append(1e3 * (time.perf_counter() - started))
    return found


def median_ms(device: torch.device, work: Callable[[], Any], repeats: int = 9) -> float:
    """Their median."""
    return round(median(timed_ms(device, work, repeats)), 4)


def device_used(device: torch.device) -> int:
    """Bytes of the whole device that are taken, by whichever process."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def launches(device: torch.device, work: Callable[[], Any]) -> dict[str, int]:
    """Kernels, copies and waits of the host in one run, as torch's profiler counts them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        work()
        synchronize(device)
    counted = {"kernels": 0, "copies": 0, "fills": 0, "waits": 0}
    for event in profile.events():
        name, on_device = event.name, event.device_type == torch.autograd.DeviceType.CUDA
        if on_device:
            kind = (
                "copies" if name.startswith("Memcpy") else "fills" if name.startswith("Memset") else "kernels"
            )
            counted[kind] += 1
        elif name in ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"):
            counted["waits"] += 1
    counted["waits"] -= bool(counted["waits"])  # the one of this function
    return counted


def random_weights(cache: ProjectorCache, rank: int, device: torch.device, seed: int = 0) -> Weights:
    """A and B of every module, on the CPU as the gate reads them, a hundredth of each weight's norm."""
    generator = torch.Generator(device).manual_seed(seed)
    found = {}
    for name, entry in cache.modules.items():
        d_out, d_in = entry.shape
        a = torch.randn(rank, d_in, generator=generator, device=device) / d_in**0.5
        b = torch.randn(d_out, rank, generator=generator, device=device)
        b *= (
            0.01
            * entry.aligned_norm
            / lowrank.norm_sums(lowrank.gram(b.mT), lowrank.gram(a))[0].sqrt().float()
        )
        found[name] = a.cpu(), b.cpu()
    return found


def write_adapter(folder: Path, weights: Weights, dtype: torch.dtype = torch.bfloat16) -> Path:
    """As a PEFT folder."""
    tensors = {}
    for name, (a, b) in weights.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype)
    rank = next(iter(weights.values()))[0].shape[0]
    parts = sorted({name.rpartition(".")[2] for name in weights})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": rank, "lora_alpha": rank}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": parts}))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def say(figures: Mapping[str, Any]) -> None:
    """One line as soon as something is known."""
    print("  " + json.dumps(figures), flush=True)
