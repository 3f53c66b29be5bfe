"""What a worker says of itself to the API servers: a plain mapping on vLLM's way between them."""

from __future__ import annotations

from typing import Any

import msgspec


class PoolState(msgspec.Struct, frozen=True):
    """The adapters that one worker has loaded, and what it did for them since it started.

    Attributes:
        engine: number of the data-parallel engine.
        slots: adapters that fit on the device (``--max-loras``).
        capacity: adapters that fit in host memory, those on the device included (``--max-cpu-loras``).
        device: ids of the adapters on the device, by which vLLM knows them.
        host: ids of those in host memory.
        loads: adapters that were loaded because a server asked for it, before a request needed them.
        step_loads: adapters that were read again between two steps: all streams waited.
        failed_steps: of these, how many could not be read, so that the aligned model answered.
        device_evictions, host_evictions: adapters that made room for others.
        load_counts: loads by seconds, one for each of `LOAD_BUCKETS` and one for the longer ones.
        load_seconds: their sum.
        gate_restarts: how often this worker started a gate again.
    """

    engine: int = 0
    slots: int = 0
    capacity: int = 0
    device: list[int] = []
    host: list[int] = []
    loads: int = 0
    step_loads: int = 0
    failed_steps: int = 0
    device_evictions: int = 0
    host_evictions: int = 0
    load_counts: list[int] = []
    load_seconds: float = 0.0
    gate_restarts: int = 0


LOAD_BUCKETS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # seconds that a load took of the engine's step loop


class Attestation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer of a guarded worker. One without these fields is not guarded.

    Attributes:
        guarded: always true.
        socket: path at which the gate listens.
        projectors: identity of the gate's projector cache.
        policy: identity of the gate's policy.
        lost: paths of accepted adapters whose published copy could not be read again.
        pool: what it has loaded.
    """

    guarded: bool
    socket: str
    projectors: str
    policy: str
    lost: list[str]
    pool: PoolState = PoolState()

    def __post_init__(self) -> None:
        if not self.guarded:
            raise ValueError("not guarded")

    def to_dict(self) -> dict[str, Any]:
        """The mapping."""
        built: dict[str, Any] = msgspec.to_builtins(self)
        return built

    @classmethod
    def from_answers(cls, answers: object) -> list[Attestation]:
        """The attestations of all workers.

        Raises:
            ValueError: an answer is not one of a guarded worker.
        """
        return msgspec.convert(answers, list[cls])  # type: ignore[valid-type]  # a class by its name
