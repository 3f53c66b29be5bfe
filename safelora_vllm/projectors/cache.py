"""The projector cache: a folder with ``manifest.json`` and safetensors shards.

For every module the shards hold

- ``NAME.projector``, Ĉ = V Vᵀ/‖V‖_F (d_out, d_out), form ``dense``; or ``NAME.delta``, V (d_out,
  d_in), form ``factored``, where V (Vᵀ B)/‖V‖_F is the cheaper product; or neither, form ``thin``;
- ``NAME.input_basis``, R (d_in, k), and ``NAME.output_basis``, L (d_out, k), both float32: V's dominant
  right and left singular vectors as columns, those of the largest singular value first, up to their signs;
- ``NAME.energy`` (k,) float64, the share of ‖V‖_F² that the first 1…k of them hold. It is (2, k) where the
  vectors are approximate, in version 3: the second row has their residuals, see `projectors.dominant`.

The manifest holds the figures of `ModuleEntry`, the identities of both checkpoints, and each shard's
sha256. The manifest's own sha256 is the cache's id: same id, same projections. ``models.json`` says which
models the build was given; the same models give the same id wherever they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from safelora_vllm.errors import ProjectorCacheError
from safelora_vllm.projectors.checkpoint import ModelName
from safelora_vllm.projectors.group import GroupSpectrum, ProjectorGroup
from safelora_vllm.projectors.held import SIDES, Held
from safelora_vllm.projectors.manifest import MANIFEST, MODELS, OPERATORS, THIN, parse_manifest
from safelora_vllm.projectors.operators_ahead import OperatorsAhead
from safelora_vllm.projectors.placement import Placement
from safelora_vllm.projectors.projector import Parts, Projector, Spectrum
from safelora_vllm.projectors.samples import Samples, open_samples
from safelora_vllm.projectors.shards import Shards

__all__ = ["Parts", "Projector", "ProjectorCache", "Spectrum"]

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
        thin: whether it holds neither Ĉ nor V, as ``build`` makes it without ``exact``.

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
        self._shards = Shards(self.folder, self._manifest)
        self._held: Held | None = None
        self._ahead: OperatorsAhead | None = None
        self._spectra: dict[tuple[tuple[str, ...], float, torch.device], GroupSpectrum] = {}
        self._basis_bytes: dict[tuple[str, Parts], int] = {}

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
        self._shards.verify(progress)

    @property
    def aligned_model(self) -> ModelName | None:
        """What the build was given as the aligned model; None in a cache of an older release."""
        try:
            given = json.loads((self.folder / MODELS).read_bytes())["aligned"]
            return ModelName(str(given["name"]), str(given["revision"]) if given["revision"] else None)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def is_aligned(self, fingerprint: str) -> bool:
        """Whether a model is the aligned side of this cache, by its fingerprint."""
        return fingerprint == self._manifest.aligned

    def samples(self) -> Samples | None:
        """Samples of the aligned model's weights; None in a cache of an older release.

        Raises:
            ProjectorCacheError: they are damaged.
        """
        return open_samples(self.folder, self._manifest.aligned)

    def check_model(self, fingerprint: str, model: str | Path) -> None:
        """Refuse a model that is not the aligned side of this cache.

        Raises:
            ProjectorCacheError: the fingerprints differ.
        """
        if not self.is_aligned(fingerprint):
            build = self.aligned_model
            given = f", {build.name}{f'@{build.revision}' if build.revision else ''}" if build else ""
            raise ProjectorCacheError(
                f"{model} is not the aligned model that the projector cache {self.folder} was built for "
                f"(fingerprint {fingerprint[:12]}, expected {self._manifest.aligned[:12]}). Give that model"
                f"{given}, not its base model or a copy in other numbers; or build a cache for this one"
            )

    def load(
        self,
        device: str | torch.device,
        placement: Placement | None = None,
        input_energy: float = 1.0,
        output_energy: float = 1.0,
        operator: bool = True,
    ) -> None:
        """Keep tensors in memory, and read the others from the shards at each use.

        As far as the cache has them: of the bases only the directions up to these energies, and Ĉ or V only
        where it is read, which is what `Parts` says. A shard whose file changed is verified again before it
        is read.

        Args:
            device: where they are used. The shares of energy stay on the CPU.
            placement: modules whose Ĉ or V is on the device or in host memory. None: all on the device.
            input_energy, output_energy, operator: see `Parts`.
        """
        device, self._ahead, self._held = torch.device(device), None, None
        held = Held(self._shards, self.modules, device)
        held.load_energies()
        self._held = held  # what is wanted of the bases is read from the energies
        for part, names, columns in self._wanted(input_energy, output_energy):
            held.load_bases(part, names, columns)
        operators = self._operators() if operator else {}
        held.load_operators(operators, placement)
        if placement is not None and placement.passing and operators:
            self._ahead = OperatorsAhead(placement.passing, device, held.read_into)

    def _wanted(self, input_energy: float, output_energy: float) -> Iterator[tuple[str, Sequence[str], int]]:
        """Part, modules and columns of each tensor of bases that `load` keeps."""
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

    def _operators(self) -> dict[str, str]:
        """Module → key of its Ĉ or V, in the order of the manifest."""
        parts = {name: OPERATORS.get(entry.form) for name, entry in self.modules.items()}
        return {name: f"{name}.{part}" for name, part in parts.items() if part}

    @contextlib.contextmanager
    def ahead(self, names: Sequence[str]) -> Iterator[None]:
        """Fetch each module's Ĉ or V that is not on the device while the one before is used.

        names: of modules, in the order in which theirs will be applied, as often as they will be.
        """
        if self._ahead is None or self._held is None:
            yield
            return
        operators = self._operators()
        keys = [operators[name] for name in names if name in operators]
        with self._ahead.following([key for key in keys if not self._held.on_device(key)]):
            yield

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
            return torch.zeros(len(names), entry.shape[SIDES[part]], 0, device=device)
        if self._held is not None and (rows := self._held.rows(part, names, columns)) is not None:
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
        """A tensor of the cache, or its first columns: what is held, or what is read now."""
        fetched = self._ahead.take(key, device) if self._ahead is not None and columns is None else None
        if fetched is not None:
            return fetched
        held = self._held.get(key) if self._held is not None else None
        if held is None or (columns is not None and held.shape[1] < columns):
            return self._shards.read(key, shard, columns).to(device)
        return held.to(device) if columns is None else held[:, :columns].to(device)

    def resident_bytes(self) -> dict[str, int]:
        """Bytes of what is read, by where it is: on the ``device``, in ``host`` memory, on ``disk``.

        On a CPU the device's memory is the host's. Before `load` everything is on disk.
        """
        if self._held is None:
            return {"device": 0, "host": 0, "disk": self._shards.tensor_bytes}
        return dict(self._held.nbytes)

    def tensor_bytes(self) -> dict[str, int]:
        """Bytes of each tensor in the shards, from their headers.

        Raises:
            ProjectorCacheError: a shard is missing or damaged.
        """
        return self._shards.sizes()


def check_not_empty(cache: ProjectorCache) -> None:
    """Raises:
    ProjectorCacheError: it has no modules.
    """
    if not cache.modules:
        raise ProjectorCacheError(f"the projector cache {cache.folder} has no modules; build it again")


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
