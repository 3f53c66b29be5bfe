"""Attackers who know the method, the projectors and the server's rules: adapters made to get through.

Each is trained on the purely malicious data *through* a projection, so that what is left behind the gate
is what was trained. The projection stands in the adapter while it learns, and gradients go through it.
Two do more. One pays for its norm, to stay below a server's caps. One adds ranks that the gate removes and
that refuse until then, so that whoever tests the upload finds it harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from safelora_vllm.projectors.cache import Projector, ProjectorCache

# A factor as it is used, from a factor as it is learned.
Through = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Attack:
    """Which factor is learned through what.

    side: ``lora_A`` or ``lora_B``. through: the projection of one module. uploads_learned: whether what
    was learned is uploaded, for the gate to project, or what the projection left of it. price: what the
    squared norm of the change, relative to the weights', costs in units of the loss. mask: the projection
    of the second half of the ranks, which are trained to refuse after the others; those are zero before.
    """

    title: str
    side: str
    through: Callable[[Projector], Through]
    uploads_learned: bool = False
    price: float = 0.0
    mask: Callable[[Projector], Through] | None = None


def constrain(adapted: nn.Module, attack: Attack, cache: ProjectorCache) -> None:
    """Have a PEFT model's factors learn through the attack's projections."""
    for name, layer in _factors(adapted, attack):
        projector = cache.projector(name)
        if attack.mask is None:
            through: nn.Module = _Through(attack.through(projector))
        else:
            through = _Halves(attack.through(projector), attack.mask(projector))
        parametrize.register_parametrization(layer, "weight", through)


def train_the_mask(adapted: nn.Module) -> None:
    """Let the second half of the ranks learn, and the first half no more."""
    for module in adapted.modules():
        if isinstance(module, _Halves):
            module.masked = True
    for name, weight in adapted.named_parameters():
        if ".lora_B." in name:
            kept = weight.shape[1] // 2
            weight.register_hook(lambda gradient, kept=kept: _without_first(gradient, kept))


def _without_first(gradient: Tensor, columns: int) -> Tensor:
    rest = gradient.clone()
    rest[:, :columns] = 0.0
    return rest


def norm_price(adapted: nn.Module, attack: Attack) -> Callable[[], Tensor]:
    """What a PEFT model's change costs now: the attack's price of Σ (‖s·BA‖_F / ‖W‖_F)² over the modules."""
    layers = [layer for layer in adapted.modules() if isinstance(layer, LoraLayer)]
    sizes = [float(layer.get_base_layer().weight.detach().square().sum()) for layer in layers]

    def price() -> Tensor:
        total = torch.zeros(())
        for layer, size in zip(layers, sizes, strict=True):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            squared = ((a @ a.T) * (b.T @ b)).sum()
            total = total + layer.scaling["default"] ** 2 * squared / size
        return attack.price * total

    return price


def release(adapted: nn.Module, attack: Attack) -> None:
    """Leave plain factors behind, those to upload."""
    for _, layer in _factors(adapted, attack):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=not attack.uploads_learned)


def _factors(adapted: nn.Module, attack: Attack) -> Iterator[tuple[str, nn.Module]]:
    """Names of the changed modules in the model's checkpoint, with the layer of one factor."""
    for name, layer in list(adapted.named_modules()):
        before, found, _ = name.partition(f".{attack.side}.default")
        if found and not name[len(before) + len(found) :]:
            yield before.removeprefix("base_model.model."), layer


class _Through(nn.Module):
    def __init__(self, through: Through) -> None:
        super().__init__()
        self._through = through

    def forward(self, factor: Tensor) -> Tensor:
        return self._through(factor)


class _Halves(nn.Module):
    """The first half of A's rows through one projection, the second, once asked for, through another."""

    def __init__(self, first: Through, second: Through) -> None:
        super().__init__()
        self._first, self._second, self.masked = first, second, False

    def forward(self, factor: Tensor) -> Tensor:
        one, other = factor.tensor_split(2)
        if self.masked:
            return torch.cat([self._first(one).detach(), self._second(other)])
        return torch.cat([self._first(one), torch.zeros_like(other)])


def _safe_lora(projector: Projector) -> Through:
    """Ĉ B. What is learned becomes as large as Ĉ is small: only a norm cap is in the way."""
    whole = projector.apply(torch.eye(projector.entry.shape[0])).float()
    return lambda b: whole @ b


def _around_inputs(energy: float) -> Callable[[Projector], Through]:
    """A outside of V's input directions: what input removal leaves as it is."""

    def through(projector: Projector) -> Through:
        basis = projector.input_basis(energy)
        return lambda a: a - (a @ basis) @ basis.T

    return through


def _within_inputs(energy: float) -> Callable[[Projector], Through]:
    """A within V's input directions: what input removal takes away."""

    def through(projector: Projector) -> Through:
        basis = projector.input_basis(energy)
        return lambda a: (a @ basis) @ basis.T

    return through


def _around_outputs(energy: float) -> Callable[[Projector], Through]:
    """B outside of V's output directions, which Safe LoRA would keep."""

    def through(projector: Projector) -> Through:
        basis = projector.output_basis(energy)
        return lambda b: b - basis @ (basis.T @ b)

    return through


def _hidden(energy: float) -> Callable[[Projector], Through]:
    """B within V's dominant output directions, where Safe LoRA's similarity is near 1."""

    def through(projector: Projector) -> Through:
        basis = projector.output_basis(energy)
        return lambda b: basis @ (basis.T @ b)

    return through


ATTACKS = {
    "through-safe-lora": Attack("trained through Safe LoRA", "lora_B", _safe_lora, uploads_learned=True),
    "around-inputs": Attack("trained around V's input directions, energy 0.9", "lora_A", _around_inputs(0.9)),
    "within-caps": Attack(
        "trained around V's input directions, energy 0.9, norm penalised",
        "lora_A", _around_inputs(0.9), price=0.3,
    ),
    "masked": Attack(
        "around V's input directions, masked by ranks that read those of energy 0.2",
        "lora_A", _around_inputs(0.9), mask=_within_inputs(0.2),
    ),
    "around-outputs": Attack(
        "trained around V's output directions, energy 0.9", "lora_B", _around_outputs(0.9)
    ),
    "hidden": Attack("trained in V's dominant output directions, energy 0.5", "lora_B", _hidden(0.5)),
}  # fmt: skip
