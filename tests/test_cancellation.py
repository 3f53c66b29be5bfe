"""Ranks that cancel: what is measured must be what is served, in every arithmetic.

Two float32 values one step apart, around the middle of two bfloat16 values, differ by 2⁻²⁴ of their size in
float32 and by 2⁻⁸ in bfloat16. A pair of ranks b₁a − b₂a then is next to nothing where it is measured in
float32, and whatever its author wanted where it is served in bfloat16. A further pair c − c with large values
makes the measured norm vanish altogether.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from safelora_vllm.adapters.read import WEIGHTS
from safelora_vllm.gate import GateSettings, admit
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import ProjectorCache
from safelora_vllm.store import PublishedStore
from tests.refusing import codes, judge
from tests.tiny import Draft, key, lora_config, module_shapes

POLICIES = {
    "all": Policy(select="all"),
    "threshold": Policy(threshold=0.4),
    "number": Policy(select="number", number=99),
    "input-removal": Policy(method="input-removal"),
}


def between(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """b₁ and b₂, float32 neighbours with bfloat16(b₁) − bfloat16(b₂) ≈ wanted."""
    exponent = torch.round(torch.log2(wanted.abs().clamp_min(1e-30)))
    low = torch.exp2(exponent + 7) * (1 + 2**-6)  # even, so that the tie rounds down to it
    middle = (low.double() + torch.exp2(exponent - 1).double()).float()
    above = torch.nextafter(middle, torch.full_like(middle, math.inf))
    positive = wanted >= 0
    return torch.where(positive, above, middle), torch.where(positive, middle, above)


def forged(hidden: float, size: float = 0.5) -> Draft:
    """An adapter over all modules; ``hidden`` is the size of the pair c − c relative to the rest."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for module, (d_out, d_in) in module_shapes().items():
        v = torch.randn(2, d_in, generator=generator).bfloat16().float()
        u = torch.randn(d_out, 2, generator=generator)
        u *= size * (d_out / 1.0) ** 0.5 / (u @ v).norm()
        first, second = between(u)
        c = (hidden * first.abs().max() * torch.randn(d_out, 1, generator=generator)).bfloat16().float()
        tensors[key(module, "B")] = torch.cat([c, -c, first, -second], dim=1)
        tensors[key(module, "A")] = torch.cat([v[:1], v[:1], v, v], dim=0)
    return Draft(lora_config(r=6, lora_alpha=6), tensors)


@pytest.mark.parametrize("hidden", [0.0, 1.0, 32.0, 4096.0])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_cancels_is_refused_or_served_as_reported(
    hidden: float, policy: Policy, dtype: torch.dtype,
    build_cache: Callable[[str, str], Path], tmp_path: Path, store: PublishedStore,
) -> None:  # fmt: skip
    settings = GateSettings(ProjectorCache(build_cache("float32", "auto")), policy, dtype=dtype)
    admission = judge(forged(hidden).write(tmp_path / "evil"), settings, store)
    if not admission.report.accepted:
        assert codes(admission) <= {"cancellation", "relative_norm", "non_finite"}
        return
    assert admission.folder is not None
    served = load_file(admission.folder / WEIGHTS)
    for module in admission.report.modules:
        a, b = (served[key(module.name, side)].double() for side in "AB")
        size = float((b @ a).norm()) / settings.cache.modules[module.name].aligned_norm
        # Both sides are float64 figures of the same rounded factors.
        assert size == pytest.approx((module.retained or 0.0) * module.relative_norm, rel=1e-6, abs=1e-9)
        assert module.decision == "projected" or policy.select == "threshold"


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_exact_opposites_are_refused_whatever_the_policy(
    policy: Policy, gate: GateSettings, tmp_path: Path, store: PublishedStore
) -> None:
    draft = forged(4096.0)
    settings = GateSettings(gate.cache, policy, dtype=torch.bfloat16)
    report = judge(draft.write(tmp_path / "evil"), settings, store).report
    assert not report.accepted and "cancellation" in {reason.code for reason in report.reasons}


def test_a_similarity_that_overflows_is_refused(
    gate: GateSettings, tmp_path: Path, store: PublishedStore
) -> None:
    """Opposite ranks near the end of float32: Ĉ B is infinite where B A is not."""
    draft = Draft()
    for name, tensor in draft.tensors.items():
        if ".lora_B." in name:
            tensor.zero_()
            tensor[:, 0], tensor[:, 1] = 3.3e38, -3.3e38
        else:
            tensor[1] = tensor[0] * (1 + 2**-20)
    report = admit(draft.write(tmp_path / "evil"), "evil", gate, store).report
    assert not report.accepted


def test_trained_and_random_adapters_are_far_from_the_bound(
    gate: GateSettings, tmp_path: Path, store: PublishedStore
) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        settings = GateSettings(gate.cache, Policy(select="all"), dtype=dtype)
        assert judge(Draft().write(tmp_path / str(dtype)), settings, store).report.accepted
