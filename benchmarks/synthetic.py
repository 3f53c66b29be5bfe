"""Synthetic modules of Llama-2-7B's shapes: projectors in the cache's own format, and adapters.

V is drawn as ``G diag(j^-p)``, G Gaussian: a spectrum that decays as a power law. The cache is written
directly, not by `safelora_vllm build`: the build also takes eigenvectors for other methods, minutes per
module at these sizes, which Safe LoRA does not read. Ĉ is the build's: float64, then the cast.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelora_vllm.projectors.build import DTYPES
from safelora_vllm.projectors.manifest import FORMAT, FORMAT_VERSION, MANIFEST, ModuleEntry

LAYERS = 32
_DECAY = 0.4
_HIDDEN, _INNER = 4096, 11008


@dataclass(frozen=True)
class Case:
    """An adapter of Llama-2-7B: rank, the (d_out, d_in) of its modules in one layer, layers to measure."""

    title: str
    rank: int
    shapes: dict[str, tuple[int, int]]
    layers: int

    @property
    def forms(self) -> list[tuple[str, str]]:
        """The (form, dtype) of the caches to compare. Without tall modules ``auto`` is ``dense``."""
        tall = any(d_out > d_in for d_out, d_in in self.shapes.values())
        forms = ("auto", "dense", "factored") if tall else ("dense", "factored")
        return [(form, dtype) for form in forms for dtype in ("bfloat16", "float32")]


def cases(quick: bool) -> dict[str, Case]:
    """The adapters that are measured; ``quick`` shrinks every side to an eighth."""
    hidden, inner = (_HIDDEN // 8, _INNER // 8) if quick else (_HIDDEN, _INNER)
    square = (hidden, hidden)
    attention = {f"self_attn.{part}_proj": square for part in "qkvo"}
    mlp = {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    only_qv = dict.fromkeys(("self_attn.q_proj", "self_attn.v_proj"), square)
    return {
        "qv-r8": Case("q, v, r = 8", 8, only_qv, 4),
        "all-r16": Case("all linear, r = 16", 16, attention | mlp, 1),
    }


def write_case(folder: Path, case: Case, adapters: int) -> None:
    """Write one projector cache per (form, dtype) and ``adapters`` adapters with their true similarities.

    A module is drawn, written and dropped before the next one: memory holds one V and one Ĉ.
    """
    torch.manual_seed(0)
    entries: dict[tuple[str, str], list[ModuleEntry]] = {kind: [] for kind in case.forms}
    weights: list[dict[str, Tensor]] = [{} for _ in range(adapters)]
    truth: list[dict[str, float]] = [{} for _ in range(adapters)]
    for layer in range(case.layers):
        for part, (d_out, d_in) in case.shapes.items():
            name = f"model.layers.{layer}.{part}"
            v = torch.randn(d_out, d_in) * torch.arange(1, d_in + 1).pow(-_DECAY)
            norm = float(v.norm(dtype=torch.float64))
            wide = v.double()
            for index in range(adapters):
                a, b = _factors(v, norm, case.rank)
                weights[index] |= {f"{name}.a": a, f"{name}.b": b}
                truth[index][name] = true_similarity(wide, norm, a, b)
            dense = (wide @ wide.T / norm).float()
            del wide
            _write_module(folder, name, (v, dense), norm, entries)
    for (form, dtype), found in entries.items():
        _write_manifest(folder / f"{form}-{dtype}", found)
    for index in range(adapters):
        save_file(weights[index], folder / f"adapter-{index}.safetensors")
        (folder / f"truth-{index}.json").write_text(json.dumps(truth[index]))


def load_adapter(folder: Path, index: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name → A (r, d_in), B (d_out, r), float32, as `safelora_vllm.adapters` hands them on."""
    tensors = load_file(folder / f"adapter-{index}.safetensors")
    names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    return {name: (tensors[f"{name}.a"].clone(), tensors[f"{name}.b"].clone()) for name in names}


def true_similarity(v: Tensor, norm: float, a: Tensor, b: Tensor) -> float:
    """cos(ĈBA, BA) over the elements of both dense deltas, 512 rows at a time; V (d_out, d_in) is float64."""
    a, b = a.double(), b.double()
    image = v @ (v.T @ b) / norm
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(b), 512):
        rows = slice(start, start + 512)
        new, old = image[rows] @ a, b[rows] @ a
        sums += torch.stack([(new * new).sum(), (new * old).sum(), (old * old).sum()])
    return float(sums[1] / (sums[0] * sums[2]).sqrt())


def _factors(v: Tensor, norm: float, rank: int) -> tuple[Tensor, Tensor]:
    """Gaussian A, and a B that leans towards V's dominant directions by a random share.

    So similarities spread over both thresholds, as those of trained adapters do.
    """
    d_out, d_in = v.shape
    a = torch.randn(rank, d_in) / d_in**0.5
    plain = torch.randn(d_out, rank)
    leaning = v @ (v.T @ plain) / norm
    share = 0.7 * float(torch.rand(()))
    mixed = plain / plain.norm() * (1 - share) + leaning / leaning.norm() * share
    return a, mixed * 0.01 * d_out**0.5


def _write_module(
    folder: Path,
    name: str,
    operators: tuple[Tensor, Tensor],
    norm: float,
    entries: dict[tuple[str, str], list[ModuleEntry]],
) -> None:
    """Add one module, given V and Ĉ in float32, to the cache of every (form, dtype)."""
    v, dense = operators
    d_out, d_in = v.shape
    unused = {"input_basis": torch.zeros(d_in, 1), "output_basis": torch.zeros(d_out, 1)}
    unused["energy"] = torch.ones(1, dtype=torch.float64)
    figures = {"norm": norm, "aligned_norm": 50 * norm, "null_similarity": 0.0}
    for (form, dtype), found in entries.items():
        chosen = form if form != "auto" else ("dense" if d_out <= d_in else "factored")
        part, tensor = ("projector", dense) if chosen == "dense" else ("delta", v)
        home, file = folder / f"{form}-{dtype}", f"{name}.safetensors"
        home.mkdir(exist_ok=True)
        tensors = {part: tensor.to(DTYPES[dtype]), **unused}
        save_file({f"{name}.{key}": value for key, value in tensors.items()}, home / file)
        found.append(ModuleEntry(name=name, shape=(d_out, d_in), form=chosen, shard=file, **figures))


def _write_manifest(folder: Path, entries: list[ModuleEntry]) -> None:
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "aligned": {"fingerprint": ""},
        "unchanged_modules": [],
        "shards": {entry.shard: _shard(folder / entry.shard) for entry in entries},
        "modules": [asdict(entry) for entry in entries],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def _shard(file: Path) -> dict[str, str | int]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"sha256": digest, "tensor_bytes": file.stat().st_size}
