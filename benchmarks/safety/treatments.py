"""What can be done to an adapter before it is served: the gate's methods, and naive ones to compare with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from groups import Step, first_within, group_of, layer_of, removed
from inputs import Inputs
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelora_vllm.adapters.read import CONFIG, WEIGHTS
from safelora_vllm.methods import lowrank
from safelora_vllm.projectors.cache import ProjectorCache

REPORT_ONLY = {"mode": "report-only"}
GUIDED = "guided-removal"
BY_OPINION = "opinion"
# New (A, B) of a module from its name, A and B, all of them float32.
Change = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Treatment:
    """One point of a curve: a method with a strength, 0 for none of it.

    policy: the rules by which the server's gate treats the adapter. make: what is done to its weights
    before that: naive methods, which the gate does not have, and attackers' preparations.
    """

    method: str
    strength: float
    policy: Mapping[str, Any] = field(default_factory=lambda: REPORT_ONLY)
    make: Change | None = None

    @property
    def name(self) -> str:
        """For names of adapters and in JSON."""
        return f"{self.method}-{self.strength:g}"


RAW = Treatment("raw", 0.0)


def safe_lora(share: float, modules: int) -> Treatment:
    """The least similar modules projected. A threshold projects the same ones, up to its own number."""
    number = round(share * modules)
    return Treatment("safe-lora", share, {"method": "safe-lora", "select": "number", "number": number})


def threshold(value: float) -> Treatment:
    """Safe LoRA by its τ."""
    return Treatment("threshold", value, {"method": "safe-lora", "select": "threshold", "threshold": value})


def input_removal(energy: float) -> Treatment:
    """Without the input directions that hold so much of alignment's energy."""
    return Treatment("input-removal", energy, {"method": "input-removal", "energy": energy})


def second_opinion(tokens: int) -> Treatment:
    """As uploaded, with a second opinion of so many tokens: the server's number."""
    return Treatment(BY_OPINION, tokens, {**REPORT_ONLY, "opinion": True})


def selective_removal(share: float, modules: int, energy: float) -> Treatment:
    """Input removal of the modules that Safe LoRA would project, the least similar ones."""
    rules = {**input_removal(energy).policy, "select": "number", "number": round(share * modules)}
    return Treatment("selective-removal", share, rules)


def both(share: float, modules: int, energy: float, cache: ProjectorCache) -> Treatment:
    """Input removal of every module, and then Safe LoRA of the least similar ones."""

    def change(module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return removed(a, cache.projector(module), energy), b

    return replace(safe_lora(share, modules), method="both", make=change)


def guided_removal(threshold: float, path: Sequence[Step], cache: ProjectorCache) -> Treatment:
    """Input removal with an energy for each group of modules: the first setting within the threshold."""
    return Treatment(GUIDED, threshold, make=_by_group(first_within(path, threshold).energies, cache))


def early_values(energy: float, cache: ProjectorCache) -> Treatment:
    """Input removal of ``v_proj`` in the first two thirds of the layers; all else stays."""
    return Treatment("early-values", energy, make=_by_group({"v_proj.0": energy, "v_proj.1": energy}, cache))


def _by_group(energies: Mapping[str, float], cache: ProjectorCache) -> Change:
    layers = 1 + max(map(layer_of, cache.modules))

    def change(module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return removed(a, cache.projector(module), energies.get(group_of(module, layers), 0.0)), b

    return change


def csulora(energy: float) -> Treatment:
    """As in its paper, which has energy 0.95."""
    return Treatment("csulora", energy, {"method": "csulora", "energy": energy})


def scaling(strength: float) -> Treatment:
    """The whole adapter made smaller, as anybody could without projectors."""
    return Treatment("scaling", strength, make=lambda _module, a, b: (a, (1.0 - strength) * b))


def random_removal(energy: float, cache: ProjectorCache) -> Treatment:
    """As input removal, but as many random directions."""
    generator = torch.Generator().manual_seed(0)

    def change(module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        rank = cache.projector(module).directions(energy)
        basis = torch.linalg.qr(torch.randn(a.shape[1], rank, generator=generator)).Q
        return a - (a @ basis) @ basis.T, b

    return Treatment("random-removal", energy, make=change)


def mean_input_removal(inputs: Inputs) -> Treatment:
    """Without the mean input's direction: what an adapter adds whatever it reads."""

    def change(module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        mean = inputs.mean(module)
        direction = mean / mean.norm()
        return (a.double() - torch.outer(a.double() @ direction, direction)).float(), b

    return Treatment("mean-removal", 1.0, make=change)


def centred_removal(energy: float, cache: ProjectorCache, inputs: Inputs, ridge: float = 1e-2) -> Treatment:
    """A' = A − (A R)(Rᵀ Σ⁻¹ R)⁻¹ Rᵀ Σ⁻¹: as A' R = 0 of input removal, with the least change of what A
    makes of the served model's inputs, Σ their covariance.
    """

    def change(module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        basis = cache.projector(module).input_basis(energy).double()
        weighed = torch.linalg.solve(inputs.covariance(module, ridge), basis)  # Σ⁻¹ R
        taken = torch.linalg.solve(basis.T @ weighed, weighed.T)
        return (a.double() - (a.double() @ basis) @ taken).float(), b

    return Treatment("centred-removal", energy, make=change)


def one_after_other(first: Change | None, second: Change | None) -> Change | None:
    """Both changes, either of which may be none."""
    if first is None or second is None:
        return first or second
    return lambda module, a, b: second(module, *first(module, a, b))


def modules_of(adapter: Path) -> int:
    """How many modules an adapter changes."""
    return sum(name.endswith("lora_A.weight") for name in load_file(adapter / WEIGHTS))


def made(treatment: Treatment, adapter: Path, folder: Path) -> Path:
    """The adapter after the treatment's ``make``, in ``folder``, or the adapter itself."""
    if treatment.make is None:
        return adapter
    tensors = load_file(adapter / WEIGHTS)
    for key in [name for name in tensors if name.endswith("lora_A.weight")]:
        other = key.replace("lora_A", "lora_B")
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        tensors[key], tensors[other] = treatment.make(module, tensors[key].float(), tensors[other].float())
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS)
    shutil.copy(adapter / CONFIG, folder / CONFIG)
    return folder


def through_safe_lora_inverse(cache: ProjectorCache, energy: float) -> Change:
    """B' with Ĉ B' = P B: what an attacker uploads so that Safe LoRA gives B back, within V's directions."""

    def change(module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        projector = cache.projector(module)
        basis = projector.output_basis(energy)
        strengths = (basis * projector.apply(basis).float()).sum(dim=0)  # Ĉ's eigenvalues
        return a, basis @ ((basis.T @ b) / strengths[:, None])

    return change


def enlarged(factor: float) -> Change:
    """The whole adapter made larger, by ``lora_alpha`` as anybody can."""
    return lambda _module, a, b: (a, factor * b)


def padded(cache: ProjectorCache, energy: float, size: float) -> Change:
    """One rank given to a direction that CSULoRA keeps, ``size`` times the adapter: so it damps no other."""

    def change(module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        projector, count = cache.projector(module), a.shape[0] - 1
        rest_a, rest_b = lowrank.reduced(a, b, count)
        norm = size * float(lowrank.norm_sums(lowrank.gram(b.mT), lowrank.gram(a))[0].sqrt())
        new_a = torch.cat([rest_a, projector.input_basis(energy)[:, -1:].T])
        new_b = torch.cat([rest_b, norm * projector.output_basis(energy)[:, -1:]], dim=1)
        return new_a.float(), new_b.float()

    return change


def first_ranks(count: int) -> Change:
    """One of several uploads that would be the adapter if they were added: its first so many ranks."""

    def change(_module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        kept_a, kept_b = lowrank.reduced(a, b, count)
        empty_a, empty_b = torch.zeros_like(a), torch.zeros_like(b)
        empty_a[:count], empty_b[:, :count] = kept_a, kept_b
        return empty_a, empty_b

    return change
