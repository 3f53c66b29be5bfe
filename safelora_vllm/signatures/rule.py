"""What a tenant's uploads have to be signed with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SigningRule:
    """Of one tenant.

    Attributes:
        keys: its public keys in PEM, by their ids.
        required: an upload without a signature is refused.
    """

    keys: dict[str, str]
    required: bool = False
