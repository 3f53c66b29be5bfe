"""One module's operators, and what is known of its V."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelora_vllm.errors import PolicyError
from safelora_vllm.projectors.manifest import ENERGY_ROUNDING, THIN, WHOLE, ModuleEntry

if TYPE_CHECKING:
    from safelora_vllm.projectors.cache import ProjectorCache


@dataclass(frozen=True)
class Parts:
    """Which parts of a cache are read while adapters are judged.

    operator: Ĉ or V. input_energy, output_energy: the share of ‖V‖_F² up to which R and L are read, or
    ``WHOLE``.
    """

    operator: bool = True
    input_energy: float = 1.0
    output_energy: float = 1.0


@dataclass(frozen=True)
class Spectrum:
    """sizes: σ_i²/‖V‖_F² of a module's first k directions, (k,) float64 on the CPU. norm: of all of them
    together. following: a bound on every one that comes after. residual: how far these directions may be off,
    see `projectors.dominant`; 0 where they are exact.
    """

    sizes: Tensor
    norm: float
    following: float
    residual: float = 0.0

    @property
    def weights(self) -> Tensor:
        """The sizes, their squares and ones, (3, k): by which `certified.sums` are taken."""
        return torch.stack([self.sizes, self.sizes**2, torch.ones_like(self.sizes)])


class Projector:
    """One module's operators on a device."""

    def __init__(self, entry: ModuleEntry, cache: ProjectorCache, device: torch.device) -> None:
        self.entry = entry
        self._cache = cache
        self._device = device

    @property
    def exact(self) -> bool:
        """Whether the cache has Ĉ or V of the module."""
        return self.entry.form != THIN

    def apply(self, b: Tensor) -> Tensor:
        """``Ĉ B`` for B (d_out, r), in the projector's dtype (paper, eq. 3 with its Ĉ).

        Of a thin module ``C_k B`` with C_k = L diag(σ_i²/‖V‖_F) Lᵀ, of all directions that the cache has.
        """
        if not self.exact:
            sizes = self.spectrum(WHOLE).sizes.to(b.device) * self.entry.norm
            return within(self.output_basis(WHOLE), sizes, b)
        if self.entry.form == "dense":
            projector = self._tensor("projector")
            return projector @ b.to(projector.dtype)
        delta = self._tensor("delta")
        return (delta @ (delta.T @ b.to(delta.dtype))) / self.entry.norm

    @cached_property
    def energies(self) -> Tensor:
        """The shares of ‖V‖_F² that its first 1…n directions hold, (n,) float64, rising, on the CPU.

        The cache ends them where its ``--max-energy`` is reached.
        """
        return self._energy[0]

    @cached_property
    def _energy(self) -> Tensor:
        """(1, n) of exact directions, (2, n) of others: the second row are their residuals."""
        stored = self._cache.tensor(f"{self.entry.name}.energy", self.entry.shard, torch.device("cpu"))
        return stored if stored.dim() == 2 else stored[None]

    def spectrum(self, energy: float) -> Spectrum:
        """Of the directions that hold ``energy`` of ‖V‖_F².

        The cache ends at its ``--max-energy``. Beyond it a value is at most the last one, or the manifest's
        bound where directions are approximate; and at most all that is left.

        Raises:
            PolicyError: as `directions`.
        """
        k, shares = self.directions(energy), self.energies
        sizes = torch.diff(shares, prepend=shares.new_zeros(1))
        residuals = self._energy[1].tolist() if len(self._energy) > 1 else []
        beyond = self.entry.following if residuals else float(sizes[-1])
        coupled = residuals[-1] if residuals else 0.0
        following = max([beyond, *sizes[k : k + 1].tolist()]) + coupled
        rest = 1.0 - (float(shares[k - 1]) if k else 0.0)
        residual = residuals[k - 1] if residuals and k else 0.0
        return Spectrum(sizes[:k], float(sizes[:k].norm()), max(0.0, min(following, rest)), residual)

    def taken(self, _energy: float) -> None:
        """All columns of its bases are its own; see `ProjectorGroup.taken`."""

    def directions(self, energy: float, clipped: bool = False) -> int:
        """k, the fewest of the cache's directions that hold ``energy`` of ‖V‖_F².

        clipped: at most as many as the cache keeps, as always where the energy is ``WHOLE``.

        Raises:
            PolicyError: the cache keeps less than that, and it is not to be clipped.
        """
        k = int((self.energies < energy - ENERGY_ROUNDING).sum()) + 1 if energy > 0 else 0
        if clipped or energy == WHOLE:
            return min(k, len(self.energies))
        if k > len(self.energies):
            raise PolicyError(
                f"`energy` {energy} is above the {float(self.energies[-1]):.3f} that the projector cache "
                f"keeps for {self.entry.name}. Build it again with a `max_energy` of {energy} or more, or "
                "give a smaller `energy`"
            )
        return k

    def input_basis(self, energy: float) -> Tensor:
        """R (d_in, k): the fewest right singular vectors of V that hold ``energy`` of ‖V‖_F²."""
        return self._tensor("input_basis", self.directions(energy))

    def output_basis(self, energy: float) -> Tensor:
        """L (d_out, k): the left singular vectors that belong to `input_basis`."""
        return self._tensor("output_basis", self.directions(energy))

    def _tensor(self, part: str, columns: int | None = None) -> Tensor:
        return self._cache.tensor(f"{self.entry.name}.{part}", self.entry.shard, self._device, columns)


def within(basis: Tensor, sizes: Tensor, b: Tensor) -> Tensor:
    """``Q diag(sizes) Qᵀ B`` of Q (d, k), sizes (k,) and B (d, r), in Q's dtype."""
    return basis @ (sizes[..., None].to(basis.dtype) * (basis.mT @ b.to(basis.dtype)))
