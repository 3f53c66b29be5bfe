"""What a tenant's uploads have to be signed with."""

from __future__ import annotations

from collections.abc import Mapping
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

    @property
    def expected(self) -> str:
        """Which keys, for a sentence."""
        return expected(self.keys)


def expected(keys: Mapping[str, str]) -> str:
    """The first of some keys, and how many more there are."""
    more = f" or one of {len(keys) - 1} more" if len(keys) > 1 else ""
    return f"the key {next(iter(keys))}{more}"
