"""What a tenant's quota leaves for one more adapter, as the gate is told: it checks before it stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from safelora_vllm.errors import QuotaExceeded
from safelora_vllm.report import Report


@dataclass(frozen=True)
class Allowance:
    """What a tenant's quota leaves. bytes: for content that is not among ``owned`` digests. rank: largest."""

    bytes: int | None = None
    owned: Sequence[str] = ()
    rank: int | None = None

    def check_bytes(self, digest: str, nbytes: int) -> None:
        """Raises QuotaExceeded where the content is new and too large."""
        if self.bytes is not None and digest not in self.owned and nbytes > self.bytes:
            raise QuotaExceeded(
                f"over the tenant's quota: the adapter has {nbytes:,} bytes, {max(0, self.bytes):,} are left "
                "of max_bytes. Remove an adapter, or ask the operator to raise the limit in the keys file"
            )

    def check_rank(self, report: Report) -> None:
        """Raises QuotaExceeded where a module's rank is too large."""
        rank = max((module.rank for module in report.modules), default=0)
        if self.rank is not None and rank > self.rank:
            raise QuotaExceeded(
                f"over the tenant's quota: the adapter has rank {rank}, max_rank is {self.rank}. Train it "
                "with a smaller one, or ask the operator to raise the limit in the keys file"
            )
