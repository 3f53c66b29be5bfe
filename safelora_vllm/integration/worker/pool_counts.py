"""What one worker's pool of adapters holds, and what was loaded and evicted since the worker started."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safelora_vllm.integration.attestation import LOAD_BUCKETS, PoolState
from safelora_vllm.integration.seams import worker as seams


class PoolCounts:
    """Counts for one worker. engine: number of its data-parallel engine."""

    def __init__(self, engine: int) -> None:
        self._engine = engine
        self._loads = self._step_loads = self.failed_steps = 0
        self._device_evictions = self._host_evictions = 0
        self._counts, self._seconds = [0] * (len(LOAD_BUCKETS) + 1), 0.0

    @contextmanager
    def change(self, manager: Any, lora_id: int, in_step: bool) -> Iterator[None]:
        """Count what adding an adapter does to the pool. Cheap where it is on the device already."""
        device, host = seams.loaded(manager)
        if lora_id in device:
            yield
            return
        device, host, start = set(device), set(host), time.perf_counter()
        try:
            yield
        finally:  # what fails halfway has evicted others by then
            after_device, after_host = map(set, seams.loaded(manager))
            self._device_evictions += len(device - after_device - {lora_id})
            self._host_evictions += len(host - after_host - {lora_id})
        if lora_id not in host:
            seconds = time.perf_counter() - start
            self._loads += not in_step
            self._step_loads += in_step
            self._counts[sum(seconds > bound for bound in LOAD_BUCKETS)] += 1
            self._seconds += seconds

    def state(self, manager: Any, gate_restarts: int) -> PoolState:
        """What the API servers are told."""
        device, host = seams.loaded(manager)
        slots, capacity = seams.sizes(manager)
        return PoolState(
            engine=self._engine,
            slots=slots,
            capacity=capacity,
            device=list(device),
            host=list(host),
            loads=self._loads,
            step_loads=self._step_loads,
            failed_steps=self.failed_steps,
            device_evictions=self._device_evictions,
            host_evictions=self._host_evictions,
            load_counts=list(self._counts),
            load_seconds=self._seconds,
            gate_restarts=gate_restarts,
        )
