"""Addresses of published copies: digests of an adapter's content and of the rules that it was judged by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from safelora_vllm.policy import Policy

Frame = Sequence[str | int]  # all rules but the policy: format, projectors, then what follows the policy


def ruleset_digest(frame: Frame, policy: Policy) -> str:
    """A digest of everything but the adapter: the same rules publish the same bytes."""
    parts = [*frame[:2], policy.id, *frame[2:]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def address(ruleset: str, digest: str) -> str:
    """The key of a published copy: its content and the rules, nothing else."""
    return hashlib.sha256(f"{ruleset}\n{digest}".encode()).hexdigest()
