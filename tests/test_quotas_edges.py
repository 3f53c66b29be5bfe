"""What is left of a quota of zero: a place is checked before an upload, bytes and rank only with it."""

from __future__ import annotations

from pathlib import Path

from safelora_vllm.store import NameStore
from safelora_vllm.tenants.principal import Principal
from safelora_vllm.tenants.quotas import Allowance, Quota, allowed


def test_a_limit_of_zero_bytes_or_ranks_takes_no_place_away(tmp_path: Path) -> None:
    """The gate refuses with what the adapter has; before it is read nobody knows."""
    tenant = Principal("tenant", "acme/ci", "acme", Quota(adapters=1, bytes=0, rank=0))
    left = allowed(NameStore(tmp_path), tenant, "acme/x", None)
    assert left == Allowance(bytes=0, owned=[], rank=0)
