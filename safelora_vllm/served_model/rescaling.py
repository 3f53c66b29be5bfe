"""Factors that quantisation tools move between neighbouring layers, and that change nothing of a model.

AWQ and SmoothQuant multiply the columns of a weight, and divide what gives it its inputs: the norm before
it, or the rows of the linear layer before it. Only layers named as Llama's are known; elsewhere a weight that
was rescaled is a weight that differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Norm → where its consumers are, their names, and what else is there.
_NORMS = {
    "input_layernorm": ("self_attn", {"q_proj", "k_proj", "v_proj"}, {"o_proj"}),
    "post_attention_layernorm": ("mlp", {"gate_proj", "up_proj"}, {"down_proj"}),
}
_FOLLOWING = {"v_proj": "o_proj", "up_proj": "down_proj"}  # linear layer → the one that reads its outputs
_LARGEST = 1000.0  # a factor, or its inverse


@dataclass
class Rescaling:
    """Of one served model.

    shapes: module → (d_out, d_in), of all weights. plain_norms: whether a norm multiplies by its weight.
    """

    shapes: Mapping[str, tuple[int, ...]]
    plain_norms: bool = True
    _inputs: dict[str, Tensor] = field(default_factory=dict)
    _outputs: dict[str, Tensor] = field(default_factory=dict)

    def norm(self, module: str, aligned: Tensor, served: Tensor) -> bool:
        """Take over a norm that differs. Returns False where that is no rescaling."""
        layer, _, last = module.rpartition(".")
        if last not in _NORMS or not self.plain_norms or f"{layer}.pre_feedforward_layernorm" in self.shapes:
            return False
        folder, readers, others = _NORMS[last]
        prefix = f"{layer}.{folder}."
        found = {name.removeprefix(prefix) for name, shape in self.shapes.items()
                 if name.startswith(prefix) and len(shape) > 1}  # fmt: skip
        if found != readers | others:
            return False
        factors = torch.where(aligned == 0, torch.where(served == 0, 1.0, torch.nan), served / aligned)
        if not _sensible(factors):
            return False
        self._inputs |= {f"{prefix}{reader}": factors for reader in readers}
        return True

    def inputs(self, module: str) -> Tensor | None:
        """Factors (d_in,) by which the columns of a served weight have to be multiplied."""
        return self._inputs.get(module)

    def outputs(self, module: str) -> Tensor | None:
        """Factors (d_out,) by which the rows of a served weight were multiplied."""
        return self._outputs.get(module)

    def rows(self, module: str, aligned: Tensor, served: Tensor) -> Tensor | None:
        """The factors (d_out,) of the aligned rows (d_out, n) that are nearest to a served weight's.

        None where no layer can undo them.
        """
        if self.shapes.get(_following(module), ())[1:] != (len(aligned),):
            return None
        norms = aligned.square().sum(1)
        factors = torch.where(norms > 0, (served * aligned).sum(1) / norms, 1.0)
        return factors if _sensible(factors) else None

    def take(self, module: str, factors: Tensor) -> None:
        """Compare the layer that reads a weight's outputs with these factors in its columns."""
        self._outputs[module] = self._inputs[_following(module)] = factors


def first_those_with_rows(names: list[str]) -> list[str]:
    """Weights in an order in which `rows` of one is called before `inputs` of the next."""
    return sorted(names, key=lambda name: name.removesuffix(".weight").rpartition(".")[2] not in _FOLLOWING)


def _following(module: str) -> str:
    prefix, _, last = module.rpartition(".")
    return f"{prefix}.{_FOLLOWING.get(last, '')}"


def _sensible(factors: Tensor) -> bool:
    return bool(((factors >= 1 / _LARGEST) & (factors <= _LARGEST)).all())
