"""Random projector caches of the shapes of known models: what policies read, with no model to build from."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from safelora_vllm.projectors.manifest import FORMAT, FORMAT_VERSION, MANIFEST, ModuleEntry

Shapes = Mapping[str, tuple[int, int]]  # module in a layer -> (d_out, d_in)
LLAMA_2_7B: Shapes = {
    **{f"self_attn.{part}_proj": (4096, 4096) for part in "qkvo"},
    "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008),
}  # fmt: skip
LLAMA_3_8B: Shapes = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
LLAMA_3_70B: Shapes = {
    "self_attn.q_proj": (8192, 8192), "self_attn.k_proj": (1024, 8192), "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192), "mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}  # fmt: skip
DIRECTIONS = 18  # that hold 0.2 of ‖V‖²


def write_cache(
    folder: Path,
    shapes: Shapes,
    layers: int = 1,
    operators: bool = True,
    device: str = "cpu",
    aligned_norm: float = 1.0,
) -> None:
    """A cache: random orthonormal bases, and 18 directions that hold 0.2 of ‖V‖²; as many again to 0.4.

    operators: also write a random Ĉ or V of every module, in bfloat16. device: where all is drawn.
    """
    folder.mkdir()
    torch.manual_seed(0)
    entries, shards = [], {}
    for layer, (part, (rows, columns)) in itertools.product(range(layers), shapes.items()):
        name, form = f"model.layers.{layer}.{part}", "dense" if rows <= columns else "factored"
        k, operator = 2 * DIRECTIONS, (rows, rows) if form == "dense" else (rows, columns)
        tensors = {
            "energy": torch.arange(1, k + 1).double() * (0.2 / DIRECTIONS),
            "input_basis": torch.linalg.qr(torch.randn(columns, k, device=device)).Q,
            "output_basis": torch.linalg.qr(torch.randn(rows, k, device=device)).Q,
        }
        if operators:
            drawn = torch.randn(operator, device=device).mul_(operator[1] ** -0.5)
            tensors["projector" if form == "dense" else "delta"] = drawn.bfloat16()
        file = f"{name}.safetensors"
        stored = {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in tensors.items()}
        save_file(stored, folder / file)
        with (folder / file).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        shards[file] = {"sha256": digest, "tensor_bytes": sum(tensor.nbytes for tensor in stored.values())}
        entries.append(asdict(ModuleEntry(name, (rows, columns), form, 1.0, aligned_norm, 0.5, file)))
    manifest = {
        "format": FORMAT, "version": FORMAT_VERSION, "aligned": {"fingerprint": ""}, "unchanged_modules": [],
        "shards": shards, "modules": entries,
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))
