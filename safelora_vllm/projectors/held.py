"""Tensors of a projector cache that are held in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from safelora_vllm.projectors.group import BasisStack
from safelora_vllm.projectors.manifest import ModuleEntry
from safelora_vllm.projectors.placement import Placement
from safelora_vllm.projectors.shards import Shards

SIDES = {"input_basis": 1, "output_basis": 0}  # part → which side of a module's shape its rows are


class Held:
    """Tensors by their keys.

    nbytes: of what is read, by where it is: ``device``, ``host`` or ``disk``.
    """

    def __init__(self, shards: Shards, modules: Mapping[str, ModuleEntry], device: torch.device) -> None:
        self.nbytes = {"device": 0, "host": 0, "disk": 0}
        self._shards, self._modules, self._device = shards, modules, device
        self._tensors: dict[str, Tensor] = {}
        self._stacks: dict[str, BasisStack] = {}  # of bases, by the same keys
        self._on_device: set[str] = set()

    def load_energies(self) -> None:
        """The shares of energy of all modules, on the CPU."""
        tier = "device" if self._device.type == "cpu" else "host"
        for name, entry in self._modules.items():
            self._add(f"{name}.energy", self._shards.read(f"{name}.energy", entry.shard), tier)

    def load_bases(self, part: str, names: Sequence[str], columns: int) -> None:
        """The first columns of that basis of modules of one shape, in one tensor."""
        side = self._modules[names[0]].shape[SIDES[part]]
        tensor = torch.empty(len(names), side, columns, device=self._device)
        stack = BasisStack(names, tensor)
        for name, room in zip(names, tensor, strict=True):
            key = f"{name}.{part}"
            room.copy_(self._shards.read(key, self._modules[name].shard, columns))
            self._stacks[key] = stack
            self._add(key, room, "device")

    def load_operators(self, keys: Mapping[str, str], placement: Placement | None) -> None:
        """Ĉ or V of modules. keys: module → its key. placement: None if all are on the device."""
        sizes = self._shards.sizes() if placement else {}
        for name, key in keys.items():
            if placement and name not in placement.on_device | placement.on_host:
                self.nbytes["disk"] += sizes[key]
                continue
            tensor = self._shards.read(key, self._modules[name].shard)
            if placement and name in placement.on_host:
                pinned = tensor if self._device.type == "cpu" else tensor.pin_memory()
                self._add(key, pinned, "host")
            else:
                self._add(key, tensor.to(self._device), "device")

    def get(self, key: str) -> Tensor | None:
        """The tensor, None if it is not held."""
        return self._tensors.get(key)

    def on_device(self, key: str) -> bool:
        """Whether it is there already."""
        return key in self._on_device

    def rows(self, part: str, names: Sequence[str], columns: int) -> Tensor | None:
        """That basis of some modules, see `BasisStack.rows`."""
        stack = self._stacks.get(f"{names[0]}.{part}")
        return stack.rows(names, columns) if stack is not None else None

    def read_into(self, key: str, buffer: Tensor) -> Tensor:
        """Ĉ or V in host memory: as it is held there, else read into a buffer (n,) uint8 on the CPU."""
        held = self._tensors.get(key)
        if held is not None:
            return held
        return self._shards.read_into(buffer, key, self._modules[key.rpartition(".")[0]].shard)

    def _add(self, key: str, tensor: Tensor, tier: str) -> None:
        self._tensors[key] = tensor
        self.nbytes[tier] += tensor.nbytes
        if tier == "device":
            self._on_device.add(key)
