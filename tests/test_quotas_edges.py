"""What is left of a quota of zero: a place is checked before an upload, bytes and rank only with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelora_vllm.errors import QuotaExceeded
from safelora_vllm.store import NameStore
from safelora_vllm.tenants.principal import Principal
from safelora_vllm.tenants.quotas import Allowance, Quota, allowed
from tests.test_report import REPORT


def test_a_limit_of_zero_bytes_or_ranks_takes_no_place_away(tmp_path: Path) -> None:
    """The gate refuses with what the adapter has; before it is read nobody knows."""
    tenant = Principal("tenant", "acme/ci", "acme", Quota(adapters=1, bytes=0, rank=0))
    left = allowed(NameStore(tmp_path), tenant, "acme/x", None)
    assert left == Allowance(bytes=0, owned=[], rank=0)


def test_an_upload_is_held_to_rank_and_to_the_bytes_that_it_is_padded_to() -> None:
    rank = max(module.rank for module in REPORT.modules)
    Allowance(bytes=100, rank=rank).check(REPORT, 100)
    Allowance(bytes=0, owned=[REPORT.digest], rank=rank).check(REPORT, 101)
    told = "over the tenant's quota: padded to its largest rank, the adapter has 1,001 bytes, 1,000 are left"
    with pytest.raises(QuotaExceeded, match=told):
        Allowance(bytes=1000).check(REPORT, 1001)
    with pytest.raises(QuotaExceeded, match=f"the adapter has rank {rank}, max_rank is {rank - 1}"):
        Allowance(bytes=1000, rank=rank - 1).check(REPORT, 1001)
