"""Building the projectors of one module of each large shape."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from gpu.common import MIB, say, synchronize
from safetensors.torch import save_file

from safelora_vllm.projectors.build import BuildOptions, build_module
from safelora_vllm.projectors.checkpoint import Checkpoint

SHAPES = {
    "warm-up": (4096, 4096), "4096x4096": (4096, 4096), "14336x4096": (14336, 4096),
    "4096x14336": (4096, 14336), "8192x8192": (8192, 8192), "8192x28672": (8192, 28672),
}  # fmt: skip
NAME = "model.layers.0.mlp.down_proj"


def measure(device: torch.device, scratch: Path, quick: bool) -> dict[str, Any]:
    """Seconds of each, files read included, and the memory that it takes. The first shape warms up."""
    found = {}
    for title, (rows, columns) in SHAPES.items():
        if quick:
            rows, columns = rows // 16, columns // 16
        torch.manual_seed(0)
        base = torch.randn(rows, columns, device=device)
        decay = torch.arange(1, columns + 1, device=device).pow(-0.4)
        folders = []
        for name, weight in (("base", base), ("aligned", base + 0.01 * torch.randn_like(base) * decay)):
            folder = scratch / f"{title}-{name}"
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
            save_file({f"{NAME}.weight": weight.bfloat16().cpu().contiguous()}, folder / "model.safetensors")
            folders.append(folder)
        del base, weight
        row: dict[str, Any] = {}
        for energy in (0.2, 0.95):
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            started = time.perf_counter()
            options = BuildOptions(exact=True, device=str(device), max_energy=energy)
            built = build_module(NAME, Checkpoint(folders[0]), Checkpoint(folders[1]), options)
            assert built is not None
            tensors = built[1]
            synchronize(device)
            row[f"energy_{energy}_s"] = round(time.perf_counter() - started, 3)
            row[f"energy_{energy}_k"] = tensors["energy"].shape[0]
        if device.type == "cuda":
            row["peak_mib"] = round(torch.cuda.max_memory_allocated(device) / MIB)
        found[title] = row
        say({title: row})
    return found
