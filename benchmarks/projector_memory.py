"""Bytes of projectors that a policy holds on the device, by the loader's own accounting.

    python benchmarks/projector_memory.py --projectors DIR

Each policy is loaded from the given cache, and from one layer of Llama-3-8B's shapes that is drawn here:
V = G diag(j^-0.4), G Gaussian, with Ĉ or V in bfloat16 and the bases up to energy 0.2. That layer's bytes are
multiplied by the number of layers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import recording
import torch
from random_projectors import LLAMA_3_8B
from safetensors.torch import save_file

from safelora_vllm.methods.reads import parts_read
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.projectors.manifest import FORMAT, FORMAT_VERSION, MANIFEST, ModuleEntry

LAYERS, ENERGY, _DECAY = 32, 0.2, 0.4
POLICIES = {
    "input-removal, all (the default)": Policy(),
    "input-removal, threshold": Policy(select="threshold"),
    "safe-lora, threshold": Policy(method="safe-lora"),
}


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--projectors", type=Path, required=True, help="a projector cache")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder for the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_layer(Path(folder))
        figures = {
            name: {
                "given_cache_bytes": held(args.projectors, policy),
                "llama_3_8b_bytes": LAYERS * held(Path(folder), policy),
                "energy": ENERGY,
            }
            for name, policy in POLICIES.items()
        }
    for name, row in figures.items():
        print(f"{name:34}", *(f"{row[key] / 2**20:12.1f} MiB" for key in row if key.endswith("bytes")))
    path = recording.write("projector_memory", "projector_memory.py", 1, {"policies": figures}, args.out)
    print(f"written to {path}")


def held(projectors: Path, policy: Policy) -> int:
    """Bytes on the device after loading what a policy reads."""
    cache = ProjectorCache(projectors)
    cache.load("cpu", None, **asdict(parts_read(policy, cache.thin)))
    return cache.resident_bytes()["device"]


def write_layer(folder: Path) -> None:
    """One layer's cache, of zeros: only the spectra matter, which say how many directions are kept."""
    torch.manual_seed(0)
    spectra: dict[tuple[int, int], torch.Tensor] = {}
    entries, shards = [], {}
    for part, (rows, columns) in LLAMA_3_8B.items():
        if (rows, columns) not in spectra:
            v = torch.randn(rows, columns) * torch.arange(1, columns + 1).pow(-_DECAY)
            gram = (v @ v.T if rows <= columns else v.T @ v).double()
            values = torch.linalg.eigvalsh(gram).flip(0)
            spectra[rows, columns] = values.cumsum(0) / values.sum()
        shares = spectra[rows, columns]
        k, name, form = (
            int((shares < ENERGY).sum()) + 1,
            f"layers.0.{part}",
            "dense" if rows <= columns else "factored",
        )
        tensors = {
            f"{name}.energy": shares[:k].clone(),
            f"{name}.input_basis": torch.zeros(columns, k),
            f"{name}.output_basis": torch.zeros(rows, k),
        }
        operator = (rows, rows) if form == "dense" else (rows, columns)
        tensors[f"{name}.{'projector' if form == 'dense' else 'delta'}"] = torch.zeros(
            operator, dtype=torch.bfloat16
        )
        file = f"{part}.safetensors"
        save_file(tensors, folder / file)
        with (folder / file).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        shards[file] = {"sha256": digest, "tensor_bytes": sum(tensor.nbytes for tensor in tensors.values())}
        entries.append(asdict(ModuleEntry(name, (rows, columns), form, 1.0, 1.0, 0.5, file)))
        print(f"{part}: {k} of {min(rows, columns)} directions hold {ENERGY:g} of ‖V‖²")
    manifest = {
        "format": FORMAT, "version": FORMAT_VERSION, "aligned": {"fingerprint": ""}, "unchanged_modules": [],
        "shards": shards, "modules": entries,
    }  # fmt: skip
    (folder / MANIFEST).write_text(json.dumps(manifest))


if __name__ == "__main__":
    main()
