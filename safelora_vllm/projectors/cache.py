"""The projector cache: a folder with ``manifest.json`` and safetensors shards.

For every module the shards hold

- ``NAME.projector``, Ĉ = V Vᵀ/‖V‖_F (d_out, d_out), form ``dense``; or ``NAME.delta``, V (d_out,
  d_in), form ``factored``, where V (Vᵀ B)/‖V‖_F is the cheaper product; or neither, form ``thin``;
- ``NAME.input_basis``, R (d_in, k), and ``NAME.output_basis``, L (d_out, k), both float32: V's dominant
  right and left singular vectors as columns, those of the largest singular value first, up to their signs;
- ``NAME.energy`` (k,) float64, the share of ‖V‖_F² that the first 1…k of them hold.

The manifest holds the figures of `ModuleEntry`, the identities of both checkpoints, and each shard's
sha256. The manifest's own sha256 is the cache's id: same id, same projections. ``models.json`` says which
models the build was given; the same models give the same id wherever they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from safelora_vllm.errors import CheckpointError, ProjectorCacheError
from safelora_vllm.files import FileState, file_state
from safelora_vllm.projectors.checkpoint import ModelName
from safelora_vllm.projectors.group import BasisStack, GroupSpectrum, ProjectorGroup
from safelora_vllm.projectors.manifest import MANIFEST, MODELS, THIN, parse_manifest
from safelora_vllm.projectors.projector import Parts, Projector, Spectrum
from safelora_vllm.projectors.weight_files import read_header

__all__ = ["Parts", "Projector", "ProjectorCache", "Spectrum"]

_SIDES = {"input_basis": 1, "output_basis": 0}  # of a module's shape
_REMEMBERED = 100_000  # sizes of bases
_SPECTRA = 256  # groups whose spectra are kept, some kilobytes each


class ProjectorCache:
    """An opened cache.

    Attributes:
        folder: where it is.
        id: a digest of its manifest; the same id gives the same projections.
        modules: name → shape, form, ‖V‖_F, ‖W_aligned‖_F and c₀ of each module with a projector.
        unchanged: names of modules that alignment did not change; adapters that change them are refused.
        aligned_norm: ‖W_aligned‖_F of all modules together.
        thin: whether it was built with ``thin`` and holds neither Ĉ nor V, which some policies need.

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
        self.thin = any(entry.form == THIN for entry in self.modules.values())
        # Shape and form → modules; those of one kind of layer are neighbours: adapters often have all of it.
        self._shapes: dict[tuple[tuple[int, int], str], list[str]] = {}
        for name in sorted(self.modules, key=lambda name: name.rpartition(".")[2]):
            entry = self.modules[name]
            self._shapes.setdefault((entry.shape, entry.form), []).append(name)
        self._resident: dict[str, Tensor] = {}
        self._stacks: dict[str, BasisStack] = {}  # of resident bases, by the same keys
        self._spectra: dict[tuple[tuple[str, ...], float, torch.device], GroupSpectrum] = {}
        self._basis_bytes: dict[tuple[str, Parts], int] = {}
        self._verified: dict[str, FileState] = {}  # shard → of its file then

    def _manifest_text(self) -> bytes:
        try:
            return (self.folder / MANIFEST).read_bytes()
        except OSError as error:
            raise ProjectorCacheError(
                f"there is no projector cache in {self.folder} ({error.strerror}); make one with "
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

    @property
    def aligned_model(self) -> ModelName | None:
        """What the build was given as the aligned model; None in a cache of an older release."""
        try:
            given = json.loads((self.folder / MODELS).read_bytes())["aligned"]
            return ModelName(str(given["name"]), str(given["revision"]) if given["revision"] else None)
        except (OSError, ValueError, KeyError, TypeError):
            return None

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
                "converted copy of that model, say so with `trust_served_model`"
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

        As far as the cache has them: of the bases only the directions up to these energies, and Ĉ or V only
        where it is read, which is what `Parts` says. The small parts of all modules come before the large
        ones: the energies (on the CPU), R, L, then Ĉ or V. All else is read from the shards at each use, and
        a shard whose file changed is verified again before that.
        """
        left = math.inf if max_bytes is None else max_bytes
        for part, names, columns in self._wanted(input_energy, output_energy, operator):
            if columns is None or len(names) == 1:
                (name,) = names
                tensor = self._read(f"{name}.{part}", self.modules[name].shard, columns)
                if tensor.nbytes > left:
                    return
                self._resident[f"{name}.{part}"] = tensor.to("cpu" if part == "energy" else device)
                left -= tensor.nbytes
                continue
            side = self.modules[names[0]].shape[_SIDES[part]]
            each = side * columns * torch.float32.itemsize
            fitting = names[: int(min(left, len(names) * each) // each)]
            stack = torch.empty(len(fitting), side, columns, device=device)
            held = BasisStack(fitting, stack)
            for name, room in zip(fitting, stack, strict=True):
                room.copy_(self._read(f"{name}.{part}", self.modules[name].shard, columns))
                self._resident[f"{name}.{part}"], self._stacks[f"{name}.{part}"] = room, held
            left -= stack.nbytes
            if len(fitting) < len(names):
                return

    def _wanted(
        self, input_energy: float, output_energy: float, operator: bool
    ) -> Iterator[tuple[str, Sequence[str], int | None]]:
        """Part, modules and columns of what `load` keeps, in its order."""
        yield from (("energy", [name], None) for name in self.modules)
        for part, energy in (("input_basis", input_energy), ("output_basis", output_energy)):
            for names in self._shapes.values():
                projectors = [self.projector(name) for name in names]
                counts = [projector.directions(energy, clipped=True) for projector in projectors]
                if max(counts) == 0:
                    continue
                held = columns_held(counts, [len(projector.energies) for projector in projectors])
                if min(held) == max(held):
                    yield part, names, held[0]
                else:
                    yield from ((part, [name], count) for name, count in zip(names, held, strict=True))
        if operator:
            for name, entry in self.modules.items():
                if entry.form != THIN:
                    yield "projector" if entry.form == "dense" else "delta", [name], None

    def basis_bytes(self, names: Sequence[str], parts: Parts) -> int:
        """What copies of a module's bases take, R in float32 and L in float64, of the largest of some."""
        found = 0
        for name in names:
            if (key := (name, parts)) not in self._basis_bytes:
                if len(self._basis_bytes) >= _REMEMBERED:
                    self._basis_bytes.clear()
                projector = self.projector(name)
                inputs, outputs = (
                    projector.directions(energy, clipped=True)
                    for energy in (parts.input_energy, parts.output_energy)
                )
                self._basis_bytes[key] = basis_bytes(self.modules[name].shape, inputs, outputs)
            found = max(found, self._basis_bytes[key])
        return found

    def in_groups(self, names: Iterable[str]) -> list[list[str]]:
        """Modules by their shape, neighbours in memory beside each other."""
        wanted = set(names)
        groups = ([name for name in group if name in wanted] for group in self._shapes.values())
        return [group for group in groups if group]

    def group(self, names: Sequence[str], device: str | torch.device = "cpu") -> ProjectorGroup:
        """The operators of modules of one shape, in the order of `in_groups`."""
        return ProjectorGroup([self.projector(n, device) for n in names], self, torch.device(device))

    def group_spectrum(self, names: tuple[str, ...], energy: float, device: torch.device) -> GroupSpectrum:
        """What `ProjectorGroup.spectrum` says, kept for the next adapters."""
        if (known := self._spectra.get((names, energy, device))) is not None:
            return known
        found = GroupSpectrum.of([self.projector(name).spectrum(energy) for name in names], device)
        if len(self._spectra) >= _SPECTRA:
            self._spectra.pop(next(iter(self._spectra)), None)
        self._spectra[names, energy, device] = found
        return found

    def bases(self, names: Sequence[str], part: str, counts: Sequence[int], device: torch.device) -> Tensor:
        """(m, d, k) of the first columns of each module's basis, k the largest count."""
        columns, entry = max(counts), self.modules[names[0]]
        if columns == 0:
            return torch.zeros(len(names), entry.shape[_SIDES[part]], 0, device=device)
        stack = self._stacks.get(f"{names[0]}.{part}")
        if stack is not None and (rows := stack.rows(names, columns)) is not None:
            return rows
        parts = [
            self.tensor(f"{name}.{part}", self.modules[name].shard, device, count)
            for name, count in zip(names, counts, strict=True)
        ]
        return torch.stack([torch.nn.functional.pad(x, (0, columns - x.shape[1])) for x in parts])

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

    def tensor_bytes(self) -> dict[str, int]:
        """Bytes of each tensor in the shards, from their headers.

        Raises:
            ProjectorCacheError: a shard is missing or damaged.
        """
        sizes: dict[str, int] = {}
        for shard in self._manifest.shards:
            try:
                header = read_header(self.folder / shard)
            except (OSError, CheckpointError) as error:
                raise self._damaged(shard, str(error)) from error
            sizes |= {key: info.nbytes for key, info in header.items()}
        return sizes

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


def basis_bytes(shape: tuple[int, int], inputs: int, outputs: int) -> int:
    """What copies of a module's bases take, R (d_in, k) in float32 and L (d_out, k) in float64."""
    d_out, d_in = shape
    return inputs * d_in * torch.float32.itemsize + outputs * d_out * torch.float64.itemsize


def columns_held(counts: Sequence[int], kept: Sequence[int]) -> list[int]:
    """Columns of a basis that modules of one shape hold, of what each needs and what the cache has of it.

    Equally many, the most that one of them needs, if all have as many: then one tensor holds them all.
    """
    most = max(counts)
    return [most] * len(counts) if most <= min(kept) else list(counts)
