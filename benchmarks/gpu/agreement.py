"""Whether a device gives the CPU's answer: figures, served weights, and what is left of removed inputs."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from gpu.common import Weights, random_weights, say
from gpu.projecting import loaded
from safetensors.torch import save_file
from torch import Tensor

from safelora_vllm.methods import judge as judge_module
from safelora_vllm.methods import lowrank
from safelora_vllm.methods.judge import JudgedModule, judge
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.build import BuildOptions, build

CPU = torch.device("cpu")
SHAPES = {"self_attn.q_proj": (512, 512), "mlp.gate_proj": (1408, 512), "mlp.down_proj": (512, 1408)}
LAYERS = 3
POLICIES = {
    "input-removal": Policy(energy=0.6),
    "input-removal, threshold": Policy(energy=0.6, select="threshold", threshold=0.4),
    "safe-lora": Policy(method="safe-lora", select="all"),
    "csulora": Policy(method="csulora", energy=0.6),
}
WANTED = {"similarity": 1e-5, "norm": 1e-12, "delta": 1e-5, "coherence": 1e-6}


def measure(device: torch.device, scratch: Path, quick: bool) -> dict[str, Any]:
    """The largest difference between both devices, by policy and kind of adapter."""
    pair = write_pair(scratch, 1 if quick else LAYERS)
    options = {where: BuildOptions(exact=True, dtype="float32", device=str(where)) for where in {CPU, device}}
    built = {where: build(*pair, scratch / where.type, chosen) for where, chosen in options.items()}
    found: dict[str, Any] = {"powers of two": powers_agree(device)}
    if device != CPU:
        found["caches"] = caches_agree(built[CPU], built[device], device)
        say({"caches built on both": found["caches"]})
    folder, worst = built[device], dict.fromkeys(WANTED, 0.0)
    for name, policy in POLICIES.items():
        here, there = (loaded(folder, policy, where) for where in (CPU, device))
        for rank in (1, 16) if quick else (1, 16, 64, 512):
            for kind, weights in hard_cases(random_weights(here, rank, CPU, rank)).items():
                with torch.inference_mode():
                    answers = [judge(weights, cache, policy, where, torch.float32)
                               for cache, where in ((here, CPU), (there, device))]  # fmt: skip
                row = differences(*answers)
                found[f"{name}, rank {rank}, {kind}"] = row
                if kind != "cancelling":  # refused by their coherence; the rest has no meaning
                    worst = {key: max(value, row.get(key, 0.0)) for key, value in worst.items()}
    found["worst"], found["removed"] = worst, removed(folder, device)
    torch.backends.cuda.matmul.allow_tf32 = True  # as some images have it
    found["removed where the process allows TF32"] = removed(folder, device)
    judge_module.exact_products = contextlib.nullcontext
    found["removed with TF32"] = removed(folder, device)
    least = max(found["removed"], found["removed where the process allows TF32"])
    found["passed"] = all(worst[key] <= limit for key, limit in WANTED.items()) and least < 1e-6
    found["passed"] = found["passed"] and found["powers of two"]
    say({key: found[key] for key in found if key.startswith(("worst", "removed", "passed"))})
    return found


def write_pair(scratch: Path, layers: int) -> tuple[Path, Path]:
    """Two checkpoints; their difference has a spectrum that decays as a power law."""
    torch.manual_seed(0)
    folders = []
    weights: dict[str, Tensor] = {}
    for name in ("base", "aligned"):
        for layer in range(layers):
            for part, (rows, columns) in SHAPES.items():
                key = f"model.layers.{layer}.{part}.weight"
                if name == "base":
                    weights[key] = torch.randn(rows, columns) / columns**0.5
                else:
                    decay = torch.arange(1, columns + 1).pow(-0.4)
                    turned = torch.linalg.qr(torch.randn(columns, columns)).Q
                    weights[key] = weights[key] + 0.01 * (torch.randn(rows, columns) * decay) @ turned.T
        folder = scratch / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file(weights, folder / "model.safetensors")
        folders.append(folder)
    return folders[0], folders[1]


def hard_cases(plain: Weights) -> dict[str, Weights]:
    """An adapter, and what authors may make of it."""
    rank = next(iter(plain.values()))[0].shape[0]
    found = {"random": plain, "tiny A, huge B": {n: (a * 1e-30, b * 1e28) for n, (a, b) in plain.items()}}
    if rank > 1:
        twice = {n: (a, torch.cat([b[:, : rank // 2]] * 2, 1)) for n, (a, b) in plain.items()}
        found["rank-deficient"] = twice
        found["cancelling"] = {
            n: (torch.cat([a[: rank // 2], -a[: rank // 2] * (1 + 1e-6)]), b) for n, (a, b) in twice.items()
        }
        found["zero ranks"] = {n: (a, b * (torch.arange(rank) % 2)) for n, (a, b) in plain.items()}
    return found


def differences(here: list[JudgedModule], there: list[JudgedModule]) -> dict[str, Any]:
    """The largest over all modules; deltas relative to what came."""
    found = dict.fromkeys(WANTED, 0.0)
    agree = 0
    for one, other in zip(here, there, strict=True):
        agree += one.projected == other.projected
        found["norm"] = max(found["norm"], abs(one.came.norm - other.came.norm) / one.came.norm)
        pairs = [(one.came.coherence, other.came.coherence), (one.served.coherence, other.served.coherence)]
        found["coherence"] = max(found["coherence"], *(abs(x - y) for x, y in pairs))
        if one.similarity and other.similarity:
            apart = abs(one.similarity.middle - other.similarity.middle)
            found["similarity"] = max(found["similarity"], apart)
        if one.projected == other.projected:
            # ‖BA − B'A'‖ by the factors side by side.
            b, a = torch.cat([one.b, other.b], 1), torch.cat([one.a, -other.a])
            squared = float(lowrank.norm_sums(lowrank.gram(b.mT), lowrank.gram(a))[0])
            found["delta"] = max(found["delta"], max(squared, 0.0) ** 0.5 / one.came.norm)
    return {**found, "same_decision": f"{agree} of {len(here)}"}


def removed(folder: Path, device: torch.device) -> float:
    """‖A'R‖/‖A'‖ of what is served: 0 but for rounding, with TF32 a thousand times as much."""
    policy, worst = Policy(energy=0.6), 0.0
    cache = loaded(folder, policy, device)
    with torch.inference_mode():
        for module in judge(random_weights(cache, 16, CPU), cache, policy, device, torch.float32):
            basis = cache.projector(module.entry.name, CPU).input_basis(0.6).cpu().double()
            worst = max(worst, float((module.a.double() @ basis).norm() / module.a.double().norm()))
    return worst


def powers_agree(device: torch.device) -> bool:
    """Whether powers of two are exact on the device."""
    exponents = torch.arange(-1022, 1024)
    return torch.equal(
        lowrank._power_of_two(exponents.to(device)).cpu(), torch.ldexp(torch.ones(2046).double(), exponents)
    )


def caches_agree(one: Path, other: Path, device: torch.device) -> dict[str, float]:
    """How far the spans of both caches' bases are apart, and how far the energies."""
    policy = Policy(energy=0.6)
    caches = loaded(one, policy, CPU), loaded(other, policy, device)
    spans, energies = 0.0, 0.0
    for name in caches[0].modules:
        bases = [cache.projector(name, CPU).input_basis(0.6).cpu().double() for cache in caches]
        k = min(basis.shape[1] for basis in bases)
        outside = bases[1][:, :k] - bases[0][:, :k] @ (bases[0][:, :k].T @ bases[1][:, :k])
        spans = max(spans, float(torch.linalg.matrix_norm(outside, 2)))
        first, second = (cache.projector(name, CPU).energies for cache in caches)
        k = min(len(first), len(second))
        energies = max(energies, float((first[:k] - second[:k]).abs().max()))
    return {"spans": spans, "energies": energies}
