"""The sign-flip risk score: does an adapter undo what alignment did? A figure to look at, never to refuse by.

Of a rank component s u vᵀ of ΔW in a module with the weight change V: x = s uᵀ (V/‖V‖_F) v. Over all
components of all modules, z = Σx / √Σx². Under signs that are independent of V it has mean 0 and variance 1.
An adapter that undoes alignment has a negative z, alignment itself a large one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from safelora_vllm.adapters.read import WEIGHTS

_MODEL = "model.safetensors"


def score(adapter: Path, base: Path, aligned: Path) -> float:
    """z of an adapter's folder."""
    tensors = load_file(adapter / WEIGHTS)
    with safe_open(base / _MODEL, "pt") as before, safe_open(aligned / _MODEL, "pt") as after:
        change = {
            name: after.get_tensor(f"{name}.weight").float() - before.get_tensor(f"{name}.weight").float()
            for name in map(module_of, factors(tensors))
        }
    found = components(tensors, change)
    return float(found.sum() / found.square().sum().sqrt())


def factors(adapter: Mapping[str, Tensor]) -> list[str]:
    """The names of an adapter's A factors."""
    return [name for name in adapter if name.endswith("lora_A.weight")]


def module_of(factor: str) -> str:
    """The module of an A factor, as the checkpoint has it."""
    return factor.removeprefix("base_model.model.").removesuffix(".lora_A.weight")


def components(adapter: Mapping[str, Tensor], change: Mapping[str, Tensor]) -> Tensor:
    """x of every rank component. change: V by module."""
    found = []
    for key in factors(adapter):
        a, b = adapter[key].double(), adapter[key.replace("lora_A", "lora_B")].double()
        q_b, r_b = torch.linalg.qr(b)
        q_a, r_a = torch.linalg.qr(a.T)
        u, s, v = torch.linalg.svd(r_b @ r_a.T)
        whole = change[module_of(key)].double()
        core = (q_b @ u).T @ whole @ (q_a @ v.T)
        found.append(s * core.diagonal() / whole.norm())
    return torch.cat(found)


def auc(harmful: Sequence[float], honest: Sequence[float]) -> float:
    """How often a harmful adapter has the lower score than an honest one; ties count half."""
    pairs = [(bad < good) + 0.5 * (bad == good) for bad in harmful for good in honest]
    return sum(pairs) / len(pairs)
