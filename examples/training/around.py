"""An attacker who knows the server's rules: A learns outside of the inputs that input removal takes away."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from safelora_vllm.projectors.cache import ProjectorCache


def constrain(adapted: nn.Module, cache: ProjectorCache, energy: float) -> list[nn.Module]:
    """Keep each A of a PEFT model outside of V's input directions of this energy while it learns.

    Larger energies have the directions of smaller ones among theirs. Gives what `release` needs.
    """
    layers = []
    for name, layer in list(adapted.named_modules()):
        if name.endswith(".lora_A.default"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
            around = _Outside(cache.projector(module).input_basis(energy))
            parametrize.register_parametrization(layer, "weight", around)
            layers.append(layer)
    return layers


def release(layers: list[nn.Module]) -> None:
    """Leave plain factors behind, as they were used."""
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


class _Outside(nn.Module):
    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self._basis = basis

    def forward(self, a: Tensor) -> Tensor:
        """A without the part in the basis."""
        return a - (a @ self._basis) @ self._basis.T
