"""A tenant's quota against what the store keeps of theirs: all versions of all names, each content once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safelora_vllm.errors import QuotaExceeded
from safelora_vllm.report import Report
from safelora_vllm.store import AdapterRecord, NameStore
from safelora_vllm.store.name_record import KEPT_VERSIONS

if TYPE_CHECKING:
    from safelora_vllm.tenants.principal import Principal

LIMITS = {
    "max_adapters": "adapters",
    "max_bytes": "bytes",
    "max_rank": "rank",
}  # keys file → Quota
_CURES = {
    "max_adapters": "remove an adapter",
    "max_bytes": "remove an adapter or an old version",
    "max_rank": "train with a smaller rank",
}


@dataclass(frozen=True)
class Quota:
    """A tenant's limits; ``None`` is no limit. adapters: loaded ones. bytes: their files. rank: of each."""

    adapters: int | None = None
    bytes: int | None = None
    rank: int | None = None

    def check(self, adapters: int, total_bytes: int, rank: int) -> None:
        """Compare with the figures as they would be with the new adapter, whose rank is ``rank``.

        Raises:
            QuotaExceeded: at least one is above its limit; all of them are named.
        """
        figures = {"max_adapters": adapters, "max_bytes": total_bytes, "max_rank": rank}
        over = {
            limit: f"{limit} is {allowed}, {figure} would be needed"
            for limit, figure in figures.items()
            if (allowed := getattr(self, LIMITS[limit])) is not None and figure > allowed
        }
        if over:
            cures = " and ".join(dict.fromkeys(_CURES[limit] for limit in over))
            raise QuotaExceeded(
                f"over the tenant's quota: {'; '.join(over.values())}. Either {cures}, or ask the operator "
                "to raise the limit in the keys file"
            )


@dataclass(frozen=True)
class Allowance:
    """What a tenant's quota leaves. bytes: for content that is not among ``owned`` digests. rank: largest."""

    bytes: int | None = None
    owned: Sequence[str] = ()
    rank: int | None = None

    def check(self, report: Report, nbytes: int) -> None:
        """Raises QuotaExceeded where vetted content is too large. nbytes: see `gate.admit.charged`."""
        self.check_rank(report)
        self.check_bytes(report.digest, nbytes, "padded to its largest rank, ")

    def check_bytes(self, digest: str, nbytes: int, how: str = "") -> None:
        """Raises QuotaExceeded where the content is new and too large. how: it has so many bytes."""
        if self.bytes is not None and digest not in self.owned and nbytes > self.bytes:
            raise QuotaExceeded(
                f"over the tenant's quota: {how}the adapter has {nbytes:,} bytes, {max(0, self.bytes):,} are "
                "left of max_bytes. Remove an adapter, or ask the operator to raise the limit in the keys "
                "file"
            )

    def check_rank(self, report: Report) -> None:
        """Raises QuotaExceeded where a module's rank is too large."""
        rank = max((module.rank for module in report.modules), default=0)
        if self.rank is not None and rank > self.rank:
            raise QuotaExceeded(
                f"over the tenant's quota: the adapter has rank {rank}, max_rank is {self.rank}. Train it "
                "with a smaller one, or ask the operator to raise the limit in the keys file"
            )


def check_quota(names: NameStore, who: Principal, record: AdapterRecord) -> None:
    """Whether a name may get this record.

    Raises:
        QuotaExceeded: it may not; admins have no quota.
    """
    if who.tenant is not None:
        own = {**own_records(names, who.tenant), record.name: record}
        who.quota.check(len(own), sum(content_sizes(own).values()), record.live.rank)


def allowed(names: NameStore, who: Principal, name: str, previous: AdapterRecord | None) -> Allowance | None:
    """What is left for new content of a name; None where nothing bounds it.

    Raises:
        QuotaExceeded: there is no room for another adapter.
    """
    if who.tenant is None:
        return None
    own = own_records(names, who.tenant)
    if previous is not None:  # its oldest version goes when there is one more
        own[name] = AdapterRecord(name, 0, previous.versions[1 - KEPT_VERSIONS :])
    who.quota.check(len({*own, name}), 0, 0)
    sizes = content_sizes(own)
    if who.quota.bytes is None:
        return Allowance(rank=who.quota.rank)
    return Allowance(who.quota.bytes - sum(sizes.values()), list(sizes), who.quota.rank)


def own_records(names: NameStore, tenant: str) -> dict[str, AdapterRecord]:
    """The records of a tenant's names."""
    return {name: record for name, record in names.all().items() if name.startswith(f"{tenant}/")}


def content_sizes(records: Mapping[str, AdapterRecord]) -> dict[str, int]:
    """Digest → bytes of all contents."""
    return {version.digest: version.bytes for record in records.values() for version in record.versions}
