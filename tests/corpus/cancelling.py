"""Ranks that cancel: next to nothing where they are measured, whatever is wanted where they are served.

Two float32 values one step apart, around the middle of two bfloat16 values, differ by 2⁻²⁴ of their size in
float32 and by 2⁻⁸ in bfloat16. A pair of ranks b₁a − b₂a then is next to nothing in float32 and large in
bfloat16. A further pair c − c with large values makes the measured norm vanish altogether.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from safelora_vllm.projectors.manifest import ModuleEntry
from tests.tiny import Draft, key, lora_config


def between(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """b₁ and b₂, float32 neighbours with bfloat16(b₁) − bfloat16(b₂) ≈ wanted."""
    exponent = torch.round(torch.log2(wanted.abs().clamp_min(1e-30)))
    low = torch.exp2(exponent + 7) * (1 + 2**-6)  # even, so that the tie rounds down to it
    middle = (low.double() + torch.exp2(exponent - 1).double()).float()
    above = torch.nextafter(middle, torch.full_like(middle, math.inf))
    positive = wanted >= 0
    return torch.where(positive, above, middle), torch.where(positive, middle, above)


def forged(modules: Mapping[str, ModuleEntry], hidden: float, size: float = 0.5) -> Draft:
    """An adapter over the modules; ``hidden`` is the size of the pair c − c relative to the rest."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for module, entry in modules.items():
        d_out, d_in = entry.shape
        v = torch.randn(2, d_in, generator=generator).bfloat16().float()
        u = torch.randn(d_out, 2, generator=generator)
        u *= size * entry.aligned_norm / (u @ v).norm()
        first, second = between(u)
        c = (hidden * first.abs().max() * torch.randn(d_out, 1, generator=generator)).bfloat16().float()
        tensors[key(module, "B")] = torch.cat([c, -c, first, -second], dim=1)
        tensors[key(module, "A")] = torch.cat([v[:1], v[:1], v, v], dim=0)
    return Draft(lora_config(r=6, lora_alpha=6), tensors)


def opposite_ends(draft: Draft) -> None:
    """Opposite ranks near the end of float32, also with a scale of 2: they are infinite in float16 only."""
    for name, tensor in draft.tensors.items():
        if ".lora_B." in name:
            tensor.zero_()
            tensor[:, 0], tensor[:, 1] = 1.6e38, -1.6e38
        else:
            tensor[1] = tensor[0] * (1 + 2**-20)
