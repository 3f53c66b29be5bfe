"""The card itself: what the other figures are to be compared with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from gpu.common import median_ms, say


def measure(device: torch.device, scratch: Path, quick: bool) -> dict[str, Any]:
    """Name, memory, bandwidth, and what bounds many small operators."""
    del scratch
    size = (2 if quick else 2048) * 2**20
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    small = torch.randn(16, 16, device=device)
    copied = median_ms(device, lambda: target.copy_(source))
    thousand = median_ms(device, lambda: [small.add_(1) for _ in range(1000)])
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_gb_per_s": round(2 * size / copied / 1e6),
        "us_an_operator": round(thousand, 2),
        "tf32_override": os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", ""),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found = {
            "card": card.name,
            "memory_bytes": card.total_memory,
            "l2_bytes": card.L2_cache_size,
            **found,
        }
    n = 256 if quick else 4096
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randn(n, n, device=device).to(dtype)
        ms = median_ms(device, lambda x=x: x @ x, 5)
        found[f"tflops_{str(dtype).removeprefix('torch.')}"] = round(2 * n**3 / ms / 1e9, 2)
    for megabytes in (1, 80):
        host = torch.randint(0, 255, (megabytes * 10**6,), dtype=torch.uint8)
        pinned = host.pin_memory() if device.type == "cuda" else host
        for kind, memory in (("pageable", host), ("pinned", pinned)):
            there = memory.to(device)
            found[f"to_device_{megabytes}mb_{kind}_ms"] = median_ms(device, lambda m=memory: m.to(device))
            found[f"to_host_{megabytes}mb_{kind}_ms"] = median_ms(
                device, lambda t=there, m=memory: m.copy_(t)
            )
    say(found)
    return found
