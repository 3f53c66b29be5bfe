"""What a worker says of itself to the API servers: a plain mapping on vLLM's way between them."""

from __future__ import annotations

from typing import Any

import msgspec


class Attestation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answer of a guarded worker. One without these fields is not guarded.

    Attributes:
        guarded: always true.
        socket: path at which the gate listens.
        projectors: identity of the gate's projector cache.
        policy: identity of the gate's policy.
        lost: paths of accepted adapters whose published copy could not be read again.
    """

    guarded: bool
    socket: str
    projectors: str
    policy: str
    lost: list[str]

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
