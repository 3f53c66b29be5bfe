"""What a gate process is started with."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class GateConfig:
    """Start settings of a gate process; JSON on its standard input.

    socket: path it listens on. model: the served model, compared with the cache's aligned side
    unless ``trust_served_model``. max_adapter_bytes: largest weights file that is read; for a small
    model less, four times the float32 factors of all cached modules at ``max_rank``, and 16 MiB.
    projector_bytes: bound on the bytes kept on ``device``. store_bytes: budget of the published copies.
    niceness: added to the process's scheduling niceness, so that traffic goes first.
    """

    socket: str
    projectors: str
    store: str
    model: str
    device: str = "cpu"
    dtype: str = "float32"
    max_rank: int = 512
    max_adapter_bytes: int = 2 * 1024**3
    policy: dict[str, Any] = field(default_factory=dict)
    trust_served_model: bool = False
    projector_bytes: int | None = None
    store_bytes: int | None = None
    niceness: int = 10

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> GateConfig:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))
