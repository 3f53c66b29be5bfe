"""The gate's memory on its device: what a policy takes of it, and what goes back.

`demand_of` and `placement.place` are what a gate does at its start and what ``plan`` says of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from safelora_vllm.errors import UsageError
from safelora_vllm.methods.judge import working_bytes
from safelora_vllm.policy import Policy
from safelora_vllm.projectors.cache import basis_bytes
from safelora_vllm.projectors.placement import Demand, Placement, place
from safelora_vllm.projectors.sizes import ModuleGroup, total

# An eighth is added to `working_bytes`, which is about what was measured (benchmarks/results/gpu_check.json).
_MARGIN = 8
# What libraries take of torch's memory, and what is lost between its blocks: an assumption, not measured.
_LIBRARY_BYTES = 128 * 1024**2
_RANKS = 512
_MIB = 2**20


def demand_of(groups: Sequence[ModuleGroup], policy: Policy, device: torch.device, max_rank: int) -> Demand:
    """What a policy takes of a device.

    Args:
        groups: all modules, and what is read of them.
        policy: of the gate.
        device: where it judges; it need not be there.
        max_rank: of the largest adapter.
    """
    held = total(group.held for group in groups)
    shapes: dict[tuple[int, int], int] = {}
    bases: dict[tuple[int, int], int] = {}
    operators: dict[str, int] = {}
    for group in groups:
        copies = basis_bytes(group.shape, max(group.input_directions), max(group.output_directions))
        shapes[group.shape] = shapes.get(group.shape, 0) + len(group.names)
        bases[group.shape] = max(bases.get(group.shape, 0), copies)
        if group.held.operator:
            operators |= dict.fromkeys(group.names, group.held.operator // len(group.names))
    ranks = {*range(1, min(max_rank, _RANKS) + 1), max_rank}  # a group has fewer modules of a larger rank
    working = max(working_bytes(shapes, rank, policy, device, bases) for rank in ranks)
    return Demand(
        bases=held.input_basis + held.output_basis,
        operators=operators,
        working=working + working // _MARGIN,
        shares=held.energy if device.type == "cpu" else 0,
    )


def placed(
    groups: Sequence[ModuleGroup], policy: Policy, device: torch.device, max_rank: int,
    budget: int | None = None, host: int = 0,
) -> tuple[Demand, Placement]:  # fmt: skip
    """What a policy takes of a device, and where its projectors are in a budget; see `demand_of`, `place`.

    Raises:
        UsageError: the budget is too small, or the device is a CPU and has no other memory than its host's.
    """
    if host and device.type == "cpu":
        raise UsageError(
            "`projector_host_memory` has no effect for a gate on a CPU, whose memory is the host's. Leave it "
            "out, and give `projector_memory` more"
        )
    demand = demand_of(groups, policy, device, max_rank)
    return demand, place(demand, budget, host)


def described(placement: Placement, device: torch.device) -> str:
    """A placement in words, for the log."""

    def mib(nbytes: int) -> str:
        return f"{nbytes / _MIB:,.1f} MiB"

    return (
        f"projector memory on {device}: {mib(placement.budget)}, of which projectors take "
        f"{mib(placement.device_bytes)} and the work of an adapter up to {mib(placement.transient)}; "
        f"{mib(placement.host_bytes)} are in pinned host memory, {mib(placement.disk_bytes)} are read from "
        "disk at each use"
    )


class Allocator(Protocol):
    """What torch keeps of a device's memory."""

    def reserved(self) -> int:
        """Bytes that it keeps, used or not."""

    def release(self) -> None:
        """Give back what is not used."""

    def take(self, nbytes: int) -> None:
        """Keep that much more for what comes, as one block."""


def allocator_of(device: torch.device) -> Allocator | None:
    """That of a device; None on a CPU, where torch keeps nothing."""
    return None if device.type in ("cpu", "meta") else _DeviceAllocator(device)


def give_back(allocator: Allocator | None, placement: Placement) -> None:
    """Let torch keep no more than the budget and what its libraries take.

    What it gives back may be gone for good, to whoever fills the device. So the memory for the work of an
    adapter is taken again at once.
    """
    if allocator is None or allocator.reserved() <= placement.budget + _LIBRARY_BYTES:
        return
    allocator.release()
    allocator.take(placement.transient - placement.passing)  # its buffers are in use all the time


class _DeviceAllocator:
    """Torch's own. Not run: it needs such a device."""

    def __init__(self, device: torch.device) -> None:
        self._torch: Any = torch.get_device_module(device)
        self._device = device

    def reserved(self) -> int:
        return int(self._torch.memory_reserved(self._device))

    def release(self) -> None:
        self._torch.empty_cache()

    def take(self, nbytes: int) -> None:
        torch.empty(nbytes, dtype=torch.uint8, device=self._device)


def no_memory(device: str, what: str) -> str:
    """The message where a device has too little memory for something."""
    return (
        f"the gate has too little memory on {device} for {what}. Leave it more (a smaller "
        "--gpu-memory-utilization), or give it another device (--gate-device cpu)"
    )
