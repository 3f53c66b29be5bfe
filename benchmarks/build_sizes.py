"""Building the projectors of large models: single modules, and a whole checkpoint with Llama 3 8B's shapes.

    python benchmarks/build_sizes.py

Every module is built twice in one process, with all singular vectors and with the dominant ones only. Then a
process of its own builds a thin cache of one layer, and another of two: the difference is what a layer takes.
CPU seconds are of all threads; other work on the machine changes them less than the wall clock's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import recording
import torch
from safetensors.torch import save_file
from torch import Tensor

from safelora_vllm.methods.certified import interval, sums
from safelora_vllm.projectors import build as building
from safelora_vllm.projectors.build import BuildOptions, build_module
from safelora_vllm.projectors.checkpoint import Checkpoint
from safelora_vllm.projectors.manifest import ModuleEntry
from safelora_vllm.projectors.projector import Projector

_HIDDEN, _KV, _INNER, _VOCABULARY, _LAYERS = 4096, 1024, 14336, 128256, 32
_LAYER = {
    "self_attn.q_proj": (_HIDDEN, _HIDDEN),
    "self_attn.k_proj": (_KV, _HIDDEN),
    "self_attn.v_proj": (_KV, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HIDDEN),
    "mlp.gate_proj": (_INNER, _HIDDEN),
    "mlp.up_proj": (_INNER, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _INNER),
}
_DECAY, _SIZE, _ENERGIES, _RANK, _ADAPTERS = 0.4, 0.02, (0.2, 0.4), 8, 20
_NAME = "model.layers.0.linear"
# Seconds before and after the digests of both models, and the largest resident size.
_MEASURED = """
import json, sys, time
from pathlib import Path
from safelora_vllm.projectors import build as building
started, manifest, found = time.monotonic(), building._manifest, {}
def timed(*given):
    found["modules_s"], found["modules_cpu_s"] = time.monotonic() - started, time.process_time()
    return manifest(*given)
building._manifest = timed
options = building.BuildOptions(modules=tuple(sys.argv[4:]))
building.build(*sys.argv[1:4], options)
found["seconds"], found["cpu_s"] = time.monotonic() - started, time.process_time()
found["peak_bytes"] = 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
print(json.dumps(found))
"""


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="an eighth of each side, to try the program")
    parser.add_argument("--out", type=Path, default=recording.RESULTS, help="folder for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shrink = 8 if args.quick else 1
    modules = {}
    for shape in dict.fromkeys(_LAYER.values()):
        rows, columns = (side // shrink for side in shape)
        with tempfile.TemporaryDirectory() as folder:
            modules[f"{rows}x{columns}"] = row = one_module(Path(folder), (rows, columns))
        print(f"{rows}x{columns}", row, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = model(Path(folder), shrink, args.threads)
    print(whole)
    figures = {"modules": modules, "model": whole}
    command = f"build_sizes.py --threads {args.threads}"
    print(f"written to {recording.write('build_sizes', command, args.threads, figures, args.out)}")


def one_module(folder: Path, shape: tuple[int, int]) -> dict[str, Any]:
    """One module with all singular vectors, and with the dominant ones."""
    write_pair(folder, {_NAME: shape}, {})
    pair = Checkpoint(folder / "base"), Checkpoint(folder / "aligned")
    v = pair[1].read(f"{_NAME}.weight").double() - pair[0].read(f"{_NAME}.weight").double()
    drawn, row = list(adapters(v)), {}
    from_here = building._DOMINANT_FROM
    for kind, smallest in (("all", sys.maxsize), ("dominant", 1)):
        building._DOMINANT_FROM = smallest
        started = time.perf_counter(), time.process_time()
        built = build_module(_NAME, *pair, BuildOptions())
        seconds, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        assert built is not None
        row[kind] = {"seconds": seconds, "cpu_s": cpu, **judged(*built, v, drawn)}
    building._DOMINANT_FROM = from_here
    for clock in ("seconds", "cpu_s"):
        row[f"times_less_{clock}"] = row["all"][clock] / row["dominant"][clock]
    return row


def judged(
    figures: dict[str, Any], tensors: dict[str, Tensor], v: Tensor, drawn: list[tuple[Tensor, Tensor, float]]
) -> dict[str, Any]:
    """How many directions there are, what they hold, and the intervals of some adapters."""

    class Cache:
        def tensor(self, *_: object) -> Tensor:
            return tensors["energy"]

    entry = ModuleEntry(_NAME, shard="", **figures)
    # `Cache` has only what a projector asks of a cache.
    projector = Projector(entry, Cache(), torch.device("cpu"))  # type: ignore[arg-type]
    row: dict[str, Any] = {"directions": len(projector.energies), "energy": float(projector.energies[-1])}
    row["energy_in_r"] = float((v @ tensors["input_basis"].double()).norm() ** 2 / v.norm() ** 2)
    for energy in _ENERGIES:
        spectrum = projector.spectrum(energy)
        basis = tensors["output_basis"][:, : len(spectrum.sizes)]
        errors, outside = [], 0
        for a, b, exact in drawn:
            gram = a.double() @ a.double().T
            dense = float(((b.double().T @ b.double()) * gram).sum())
            found = interval(sums(b, gram, basis, spectrum.weights).tolist(), dense, 1 / _RANK, spectrum)
            outside += not abs(found.middle - exact) <= found.error + 1e-12
            errors.append(found.error)
        row[f"energy_{energy}"] = {
            "directions": len(spectrum.sizes),
            "residual": spectrum.residual,
            "following": spectrum.following,
            "similarity_error_median": median(errors),
            "outside": outside,
        }
    return row


def adapters(v: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
    """A, B and the exact similarity: half of them Gaussian, half leaning towards V's first directions."""
    generator = torch.Generator().manual_seed(1)
    for index in range(_ADAPTERS):
        a = torch.randn(_RANK, v.shape[1], generator=generator)
        b = torch.randn(v.shape[0], _RANK, generator=generator)
        if index % 2:
            b = (v @ (v.T @ b.double())).float()
        image, gram = v @ (v.T @ b.double()), a.double() @ a.double().T
        sizes = [float(((x.T @ y) * gram).sum()) for x, y in ((image, image), (image, b.double()))]
        yield a, b, sizes[1] / (sizes[0] * float(((b.double().T @ b.double()) * gram).sum())) ** 0.5


def model(folder: Path, shrink: int, threads: int) -> dict[str, Any]:
    """Builds of one and of two layers, and what that makes for all."""
    shapes = {
        f"model.layers.{layer}.{part}": (rows // shrink, columns // shrink)
        for layer in range(2)
        for part, (rows, columns) in _LAYER.items()
    }
    vocabulary = (_VOCABULARY // shrink, _HIDDEN // shrink)
    write_pair(folder, shapes, {"model.embed_tokens": vocabulary})
    found: dict[str, Any] = {"vocabulary": vocabulary}
    for layers in (1, 2):
        names = [name for name in shapes if int(name.split(".")[2]) < layers]
        places = [str(folder / name) for name in ("base", "aligned", f"cache-{layers}")]
        command = [sys.executable, "-c", _MEASURED, *places, *names]
        environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": ":".join(filter(None, sys.path))}
        environment |= {name: value for name, value in os.environ.items() if name.startswith("OMP_WAIT")}
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
        found[f"layers_{layers}"] = json.loads(done.stdout)
    # bfloat16 bytes of one model: of a layer, and of the embedding, which the real one has twice.
    layer_bytes = sum(rows * columns for rows, columns in shapes.values())
    embedding = 2 * vocabulary[0] * vocabulary[1]
    more = (_LAYERS * layer_bytes + 2 * embedding) / (2 * layer_bytes + embedding)
    for whole, modules in (("seconds", "modules_s"), ("cpu_s", "modules_cpu_s")):
        layer = found["layers_2"][modules] - found["layers_1"][modules]
        digests = found["layers_2"][whole] - found["layers_2"][modules]
        found[f"layer_{whole}"] = layer
        found[f"all_layers_{whole}"] = _LAYERS * layer + more * digests
    found["largest_tensor_bytes"] = 2 * max(rows * columns for rows, columns in shapes.values())
    return found


def write_pair(folder: Path, shapes: dict[str, tuple[int, int]], others: dict[str, tuple[int, int]]) -> None:
    """Both checkpoints in bfloat16; V = G diag(j^-0.4) in the shapes, and nothing changes in the others."""
    index: dict[str, dict[str, str]] = {"base": {}, "aligned": {}}
    for side in index:
        (folder / side).mkdir()
        (folder / side / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, (rows, columns) in (shapes | others).items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4])
        generator = torch.Generator().manual_seed(seed)
        base = _SIZE * torch.randn(rows, columns, generator=generator)
        aligned = base
        if name in shapes:
            change = torch.randn(rows, columns, generator=generator)
            aligned = base + _SIZE * change.mul_(torch.arange(1, columns + 1).pow(-_DECAY))
        for side, weight in (("base", base), ("aligned", aligned)):
            file = f"{name}.safetensors"
            save_file({f"{name}.weight": weight.bfloat16()}, folder / side / file)
            index[side][f"{name}.weight"] = file
    for side, weight_map in index.items():
        (folder / side / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


if __name__ == "__main__":
    main()
