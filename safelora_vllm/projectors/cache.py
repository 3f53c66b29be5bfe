"""The projector cache: a folder with ``manifest.json`` and safetensors shards.

For every module the shards hold

- ``NAME.projector``, Ĉ = V Vᵀ/‖V‖_F (d_out, d_out), form ``dense``; or ``NAME.delta``, V (d_out,
  d_in), form ``factored``, where V (Vᵀ B)/‖V‖_F is the cheaper product;
- ``NAME.input_basis``, R (d_in, k), and ``NAME.output_basis``, L (d_out, k), both float32: V's dominant
  right and left singular vectors as columns, those of the largest singular value first, up to their signs;
- ``NAME.energy`` (k,) float64, the share of ‖V‖_F² that the first 1…k of them hold.

The manifest holds the figures of `ModuleEntry`, the identities of both checkpoints, and each shard's
sha256. The manifest's own sha256 is the cache's id: same id, same projections.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safelora_vllm.errors import PolicyError, ProjectorCacheError
from safelora_vllm.files import FileState, file_state
from safelora_vllm.projectors.manifest import ENERGY_ROUNDING, MANIFEST, ModuleEntry, parse_manifest


@dataclass(frozen=True)
class Parts:
    """Which parts of a cache are read while adapters are judged.

    operator: Ĉ or V. input_energy, output_energy: the share of ‖V‖_F² up to which R and L are read.
    """

    operator: bool = True
    input_energy: float = 1.0
    output_energy: float = 1.0


class Projector:
    """One module's operators on a device."""

    def __init__(self, entry: ModuleEntry, cache: ProjectorCache, device: torch.device) -> None:
        self.entry = entry
        self._cache = cache
        self._device = device

    def apply(self, b: Tensor) -> Tensor:
        """``Ĉ B`` for B (d_out, r), in the projector's dtype (paper, eq. 3 with its Ĉ)."""
        if self.entry.form == "dense":
            projector = self._tensor("projector")
            return projector @ b.to(projector.dtype)
        delta = self._tensor("delta")
        return (delta @ (delta.T @ b.to(delta.dtype))) / self.entry.norm

    @cached_property
    def energies(self) -> Tensor:
        """The shares of ‖V‖_F² that its first 1…n singular values hold, (n,) float64, rising, on the CPU.

        The cache ends them where its ``--max-energy`` is reached.
        """
        return self._cache.tensor(f"{self.entry.name}.energy", self.entry.shard, torch.device("cpu"))

    def spectrum(self, energy: float) -> tuple[Tensor, float]:
        """σ_i²/‖V‖_F² (k,) float64 of the directions of `output_basis`, and a bound on all that follow.

        The cache ends at its ``--max-energy``: beyond it a value is at most the last one, and at most all
        that is left.
        """
        k, shares = self.directions(energy), self.energies
        sizes = torch.diff(shares, prepend=shares.new_zeros(1))
        if k < len(shares):
            return sizes[:k], float(sizes[k])
        return sizes, max(0.0, min(float(sizes[-1]), 1.0 - float(shares[-1])))

    def directions(self, energy: float, clipped: bool = False) -> int:
        """k, the fewest singular values of V that hold ``energy`` of ‖V‖_F².

        clipped: at most as many as the cache keeps.

        Raises:
            PolicyError: the cache keeps less than that, and it is not to be clipped.
        """
        k = int((self.energies < energy - ENERGY_ROUNDING).sum()) + 1 if energy > 0 else 0
        if clipped:
            return min(k, len(self.energies))
        if k > len(self.energies):
            raise PolicyError(
                f"energy {energy} is above the {float(self.energies[-1]):.3f} that the projector cache "
                f"keeps for {self.entry.name}; build it again with --max-energy {energy} or more"
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


class ProjectorCache:
    """An opened cache. ``modules`` maps module names to their entries.

    Raises:
        ProjectorCacheError: no cache there, another format version, or a manifest that is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        text = self._manifest_text()
        self.id = hashlib.sha256(text).hexdigest()
        self._manifest = parse_manifest(text, self.folder)
        self.modules, self.unchanged = self._manifest.modules, self._manifest.unchanged
        # ‖W_aligned‖_F of all modules together.
        self.aligned_norm = math.hypot(*(entry.aligned_norm for entry in self.modules.values()))
        self._resident: dict[str, Tensor] = {}
        self._verified: dict[str, FileState] = {}  # shard → of its file then

    def _manifest_text(self) -> bytes:
        try:
            return (self.folder / MANIFEST).read_bytes()
        except OSError as error:
            raise ProjectorCacheError(
                f"no projector cache in {self.folder} ({error.strerror}); make one with "
                "'safelora-vllm build --base BASE --aligned ALIGNED --out DIR'"
            ) from error

    def verify(self, progress: Iterable[str] | None = None) -> None:
        """Compare every shard with the manifest's sha256.

        Raises:
            ProjectorCacheError: a shard is missing or its bytes changed.
        """
        for name in progress if progress is not None else sorted(self._manifest.shards):
            self._verify_shard(name)

    def _verify_shard(self, name: str) -> None:
        try:
            with (self.folder / name).open("rb") as file:
                state = file_state(os.fstat(file.fileno()))
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise self._damaged(name, str(error.strerror)) from error
        if found != self._manifest.shards[name].sha256:
            raise self._damaged(name, "its bytes are not those that the build wrote")
        self._verified[name] = state

    def check_model(self, fingerprint: str, model: str | Path) -> None:
        """Refuse to serve a model that is not the aligned side of this cache.

        Raises:
            ProjectorCacheError: the fingerprints differ.
        """
        if fingerprint != self._manifest.aligned:
            raise ProjectorCacheError(
                f"the projector cache {self.folder} was made for another aligned model than {model} "
                f"(fingerprint {self._manifest.aligned[:12]}, served {fingerprint[:12]}). Serve the "
                "model given as --aligned, or build a cache for this one. If it is a quantised or "
                "converted copy of that model, say so with --trust-served-model"
            )

    def load(
        self,
        device: str | torch.device,
        max_bytes: int | None = None,
        input_energy: float = 1.0,
        output_energy: float = 1.0,
        operator: bool = True,
    ) -> None:
        """Keep tensors on ``device``, up to ``max_bytes`` of them.

        Of the bases only the directions up to these energies, as far as the cache has them, and Ĉ or V only
        where it is read: what `Parts` says. The small parts of all modules come before the large ones: the
        energies (on the CPU), R, L, then Ĉ or V. All else is read from the shards at each use, and a shard
        whose file changed is verified again before that.
        """
        used = 0
        for entry, part, columns in self._wanted(input_energy, output_energy, operator):
            key = f"{entry.name}.{part}"
            tensor = self._read(key, entry.shard, columns).to("cpu" if part == "energy" else device)
            if max_bytes is not None and used + tensor.nbytes > max_bytes:
                return
            used += tensor.nbytes
            self._resident[key] = tensor

    def _wanted(
        self, input_energy: float, output_energy: float, operator: bool
    ) -> Iterator[tuple[ModuleEntry, str, int | None]]:
        """Module, part and columns of what `load` keeps, in its order."""
        entries = self.modules.values()
        yield from ((entry, "energy", None) for entry in entries)
        for part, energy in (("input_basis", input_energy), ("output_basis", output_energy)):
            for entry in entries:
                if columns := self.projector(entry.name).directions(energy, clipped=True):
                    yield entry, part, columns
        if operator:
            yield from ((e, "projector" if e.form == "dense" else "delta", None) for e in entries)

    def projector(self, name: str, device: str | torch.device = "cpu") -> Projector:
        """The operators of one module. ``name`` must be in ``modules``."""
        return Projector(self.modules[name], self, torch.device(device))

    def tensor(self, key: str, shard: str, device: torch.device, columns: int | None = None) -> Tensor:
        """A tensor of the cache, or its first columns: what is resident, or what is read now."""
        resident = self._resident.get(key)
        if resident is None or (columns is not None and resident.shape[1] < columns):
            return self._read(key, shard, columns).to(device)
        return resident if columns is None else resident[:, :columns]

    def resident_bytes(self) -> dict[str, int]:
        """Bytes held per device type, and under ``disk`` those that are read at each use."""
        tiers: dict[str, int] = {}
        for tensor in self._resident.values():
            tiers[tensor.device.type] = tiers.get(tensor.device.type, 0) + tensor.nbytes
        total = sum(shard.tensor_bytes for shard in self._manifest.shards.values())
        tiers["disk"] = total - sum(tiers.values())
        return tiers

    def _read(self, key: str, shard: str, columns: int | None = None) -> Tensor:
        """A tensor from disk, in memory of its own: a mapped file that is cut short kills its readers.

        A shard is verified before its first use, and again when its file changed.
        """
        try:
            if self._verified.get(shard) != file_state((self.folder / shard).stat()):
                self._verify_shard(shard)
            with safe_open(self.folder / shard, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
                return tensor.clone() if columns is None else tensor[:, :columns].clone()
        except (OSError, SafetensorError) as error:
            raise self._damaged(shard, str(error)) from error

    def _damaged(self, shard: str, why: str) -> ProjectorCacheError:
        return ProjectorCacheError(
            f"shard {shard} of the projector cache {self.folder} cannot be used: {why}. "
            "Restore it or build the cache again"
        )
